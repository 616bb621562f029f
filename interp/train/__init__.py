"""The dictionary trainer: configuration, loop, run folder, and the whole job."""
