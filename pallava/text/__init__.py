"""Conversations as the token ids a model is trained on: templates, encoding, chat turns."""
