"""Classifiers over stored embeddings: tile probes, fine-tuned slide encoder, bag models."""
