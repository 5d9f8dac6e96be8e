"""A conversation in the terminal: its turns, pictures, commands and files. Imports neither MLX nor NumPy."""
