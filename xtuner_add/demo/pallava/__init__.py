"""`xtuner-add demo`: from images to a model that answers questions, on synthetic data."""
