"""Encodes conversations as token ids: prompt templates, encoding, chat turns."""
