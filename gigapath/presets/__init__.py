"""Prov-GigaPath's tile encoders as presets of `pathcore.encoders`."""

from pathlib import Path


def folder() -> Path:
    """Returns the folder of the preset files; an entry point of `pathcore.encoders` names it."""
    return Path(__file__).parent
