"""The client of the background server that keeps a model warm; imports neither MLX nor NumPy nor the server."""
