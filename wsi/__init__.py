"""Whole-slide images: reading, tissue detection, tiling, patch extraction; without torch."""
