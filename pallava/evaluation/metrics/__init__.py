"""Metrics for open, yes/no, multiple-choice and class answers, with intervals and as published."""
