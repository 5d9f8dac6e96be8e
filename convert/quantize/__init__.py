"""Quantizes a checkpoint and reports what that cost."""
