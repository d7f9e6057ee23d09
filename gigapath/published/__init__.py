"""Tiling and file formats of the published Prov-GigaPath code."""
