"""Class names, wordings and prompts of public classification sets."""
