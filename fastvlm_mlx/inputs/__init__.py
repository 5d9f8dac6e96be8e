"""What a user has, images and conversations, to NumPy arrays. Nothing here imports MLX."""
