"""Other ways to act: gates, a direction per row, clamped latents, files of other tools."""
