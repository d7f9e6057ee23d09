"""Benchmarks against straightforward implementations; docs/benchmarks.md reports the results."""
