"""Trainers: of dictionaries, from text to a measured folder, and of small language models, the testbed's among them."""
