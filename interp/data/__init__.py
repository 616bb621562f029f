"""Text to tokens to activations: documents, packing, and the activation store."""
