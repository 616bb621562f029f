"""Steering: directions and maps that change what a model says, and what they cost."""
