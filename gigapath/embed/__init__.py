"""Tile embeddings and slide embeddings of many slides: `xtuner-add embed`."""
