"""Quantizes a checkpoint and reports what was lost."""
