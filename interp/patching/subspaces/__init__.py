"""Parts of an activation: directions, rotations, and whether they are what the model uses."""
