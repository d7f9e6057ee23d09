"""Releases a trained model: converts, merges, splits, exports and publishes checkpoints."""
