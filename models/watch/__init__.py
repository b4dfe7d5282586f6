"""Watching a run: connecting its processes, and noticing what goes wrong with them."""
