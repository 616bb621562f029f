"""Evaluations of dictionaries, one definition each."""
