"""Computes tile and slide embeddings of many slides; behind the command `xtuner-add embed`."""
