"""Converted checkpoints on disk."""
