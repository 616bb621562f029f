"""Circuits: sets of edges, run alone, judged and compared."""
