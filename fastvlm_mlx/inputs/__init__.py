"""Turns what a user has, images and conversations, into NumPy arrays. Nothing here imports MLX."""
