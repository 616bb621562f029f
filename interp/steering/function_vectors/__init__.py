"""Function vectors: what a few heads carry from examples to an answer, as one vector."""
