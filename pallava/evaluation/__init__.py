"""Benchmarks: asks a model their questions and scores the answers."""
