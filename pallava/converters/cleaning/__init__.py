"""Cleaning of image-text data as named steps, each of which looks at one row at a time."""
