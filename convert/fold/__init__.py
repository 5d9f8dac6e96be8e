"""Folds branches, norms and scales into single weights."""
