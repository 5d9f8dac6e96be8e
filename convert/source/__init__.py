"""Reads a checkpoint in any published layout."""
