"""What a dose does, and what it costs."""
