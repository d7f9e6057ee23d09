"""Measurements beside straightforward implementations; results stand in docs/benchmarks.md."""
