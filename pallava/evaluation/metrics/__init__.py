"""Scores of answers: open, yes/no, multiple choice, classes; with intervals, and as published."""
