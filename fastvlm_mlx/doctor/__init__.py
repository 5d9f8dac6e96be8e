"""Checks that a machine and a model do what they should, and shows how far they are from it."""
