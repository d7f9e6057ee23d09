"""Formats and tiling of the published Prov-GigaPath code."""
