"""Concepts as geometry, and methods compared on them."""
