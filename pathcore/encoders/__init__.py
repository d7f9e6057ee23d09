"""Image and image-text encoders of pathology by name, each with its own transform.

Importing this package imports no torch; building an encoder does.
"""

from pathcore.encoders.presets import Preset, get_preset, list_encoders
from pathcore.encoders.transform import Transform

__all__ = ["Preset", "Transform", "get_preset", "list_encoders"]
