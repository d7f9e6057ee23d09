"""Cleans image-text data in named steps, each of which judges one row at a time."""
