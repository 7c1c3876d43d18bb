"""Images: a picture becomes a row-major sequence of patches."""
