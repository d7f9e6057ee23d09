"""Prompts for the demo's small describer, one line each, the only ones it was trained on."""
