"""Circuits of dictionaries' latents: attributions through a prompt that is held linear."""
