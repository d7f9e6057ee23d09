"""A trained model for people and programs: web page and OpenAI-compatible endpoint."""
