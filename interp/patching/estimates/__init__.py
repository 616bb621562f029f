"""Estimates of what patching would do, from gradients, for every node or edge at once."""
