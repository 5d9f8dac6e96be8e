"""Arrays to arrays: the vision tower, the decoder, and both as one model. Nothing here opens a file."""
