"""Arrays in, token ids out. Nothing here knows text or files."""
