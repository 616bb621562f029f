"""The small world: text whose truth is known, and the language models that learnt it."""
