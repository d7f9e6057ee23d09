"""Inference with trained models: loading, single and batched questions, streamed chat."""
