"""Wordings of the request to describe an image, as JSON lists."""
