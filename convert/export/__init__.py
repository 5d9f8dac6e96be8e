"""Writes checkpoints for other programs."""
