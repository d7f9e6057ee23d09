"""Configs of public classification sets: class names, wordings and prompts."""
