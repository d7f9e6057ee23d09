"""Serves a trained model as a web page and an OpenAI-compatible endpoint."""
