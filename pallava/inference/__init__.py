"""Trained models that answer: loading folders, single and batched questions, streamed chat."""
