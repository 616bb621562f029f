"""What is trained or transported: supervised vectors, rank-1 and low-rank edits, maps between distributions."""
