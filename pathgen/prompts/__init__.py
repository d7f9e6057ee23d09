"""Prompts as data: one JSON file for each, in this project's own wording."""
