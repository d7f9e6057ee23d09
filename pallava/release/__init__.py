"""From a training checkpoint to a model that others can load: convert, merge, split, publish."""
