"""Sparse dictionaries, one file per architecture, saved in SAELens' inference format."""
