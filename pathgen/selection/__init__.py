"""Selects representative patches of slides."""
