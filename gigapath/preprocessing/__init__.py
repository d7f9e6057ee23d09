"""Import path of the published preprocessing code."""
