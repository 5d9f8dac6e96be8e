"""Work over many images."""
