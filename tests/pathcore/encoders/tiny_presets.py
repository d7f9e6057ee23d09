"""A preset at a tiny width, as another package adds it, and its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch

from pathcore.encoders import presets

TINY_VIT: dict[str, Any] = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=4)


@contextmanager
def preset_folder(folder: Path) -> Iterator[None]:
    """Adds a folder of presets within."""
    folders = list(presets._folders())
    caches = (presets._files, presets._read_encoder_preset)
    with mock.patch.object(presets, "_folders", lambda: iter([*folders, folder])):
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


@contextmanager
def tiny_uni(folder: Path) -> Iterator[str]:
    """A preset on UNI's architecture with a transform of its own, and weights in timm's layout."""
    (folder / "presets").mkdir()
    content = {
        "extends": "uni",
        "arguments": {**TINY_VIT, "init_values": 1e-5, "dynamic_img_size": True},
        "transform": {"resize_px": 32, "crop_px": 32, "interpolation": "bilinear",
                      "mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.2]},
        "embed_dim": 24, "patch_px": 40, "mpp": [1.0, 0.25],
    }  # fmt: skip
    (folder / "presets/tiny-uni.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model = timm.create_model("vit_large_patch16_224", num_classes=0, init_values=1e-5, **TINY_VIT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    torch.save(model.state_dict(), folder / "weights.bin")
    with preset_folder(folder / "presets"):
        yield f"tiny-uni@{folder / 'weights.bin'}"
