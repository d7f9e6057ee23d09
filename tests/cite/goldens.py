"""Recorded outputs of the published code, and our modules with the recorded weights."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cite.encoders import build_encoder
from cite.prompted import PromptedEncoder

GOLDEN = Path(__file__).parents[1] / "golden" / "cite"
CLIP_WEIGHTS = GOLDEN / "tiny_clip_visual.safetensors"
VIT_WEIGHTS = GOLDEN / "tiny_mmcls_vit.safetensors"

FP32 = dict(rtol=1e-4, atol=2e-5)
FP16 = dict(rtol=0, atol=2e-2)
"""Tolerances of the goldens' README."""

CLIP_ARCH: dict[str, Any] = dict(
    embed_dim=48,
    quick_gelu=True,
    vision_cfg=dict(image_size=32, patch_size=8, width=128, layers=3, head_width=64),
)
VIT_ARCH = dict(embed_dims=64, num_layers=3, num_heads=2, feedforward_channels=256)
CLIP: dict[str, Any] = dict(library="open_clip", config=CLIP_ARCH)
VIT: dict[str, Any] = dict(library="mm", arch=VIT_ARCH, img_size=32, patch_size=8)
"""Descriptions for `build_encoder`."""


@lru_cache
def read_arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def clip_encoder(project: bool = True, **arguments: Any) -> PromptedEncoder:
    feature = "projected" if project else "class"
    description = dict(library="open_clip", config=CLIP_ARCH, feature=feature)
    return PromptedEncoder(build_encoder(description, CLIP_WEIGHTS), **arguments)


def vit_encoder(**arguments: Any) -> PromptedEncoder:
    return PromptedEncoder(build_encoder(VIT, VIT_WEIGHTS), **arguments)
