"""Measurements and the cost model."""
