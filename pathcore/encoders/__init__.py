"""Image and image-text encoders for pathology by name, each with its own transform.

Importing this package does not import torch; building an encoder does.

Example:
    >>> list_encoders("uni2")
    ['uni2-h']
    >>> preset = get_preset("uni")
    >>> preset.hub, preset.embed_dim, preset.transform.output_px
    ('MahmoodLab/UNI', 1024, 224)
"""

from typing import TYPE_CHECKING, Any

from pathcore.encoders.presets import Preset, get_preset, list_encoders
from pathcore.encoders.transform import Transform
from pathcore.extras import says_extra

if TYPE_CHECKING:
    from pathcore.encoders.encoder import (
        Encoder,
        EncoderError,
        EncoderName,
        Network,
        create_encoder,
        find_transform,
        open_image_tower,
    )
    from pathcore.encoders.towers import Tower

__all__ = [
    "Encoder",
    "EncoderError",
    "EncoderName",
    "Network",
    "Preset",
    "Tower",
    "Transform",
    "create_encoder",
    "find_transform",
    "get_preset",
    "list_encoders",
    "open_image_tower",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        with says_extra(f"pathcore.{name}", "gigapath"):
            from pathcore.encoders import encoder  # imports torch

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
