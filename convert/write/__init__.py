"""Writes a checkpoint folder, complete or not at all."""
