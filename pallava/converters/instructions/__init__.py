"""Requests to describe an image, as JSON lists."""
