"""The formulations that MLX's CPU backend runs fastest."""
