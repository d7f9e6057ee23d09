"""Weights and inputs of the recorded slide encoder outputs: made by a recipe, not stored."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from gigapath.slide_encoder import LongNetViT

GOLDEN = Path(__file__).parents[1] / "golden" / "gigapath"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_json(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def _random(tag: str) -> np.random.RandomState:
    # The legacy generator: its numbers are the same on every version of numpy.
    return np.random.RandomState(zlib.crc32(tag.encode("utf-8")))


def _unit(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform noise of mean 0 and variance 1."""
    noise = _random(tag).random_sample(int(np.prod(shape)))
    return ((2.0 * noise - 1.0) * 3.0**0.5).reshape(shape)


def recipe_state(model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any slide encoder, by the names and shapes of its parameters."""
    state = {}
    for name, tensor in model_state.items():
        shape = tuple(tensor.shape)
        values = _unit(f"w0:{name}", shape)
        if len(shape) == 3:
            values = 0.5 * values
        elif len(shape) == 2:
            gain = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
            values = gain * values / np.sqrt(shape[1])
        elif name.endswith(".weight"):
            values = 1.0 + 0.1 * values
        else:
            values = 0.1 * values
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def recipe_inputs(
    tag: str, batch: int, length: int, in_chans: int, ngrids: int = 1000
) -> tuple[Tensor, Tensor]:
    """Tile embeddings `(B, L, C)` and coordinates `(B, L, 2)` on cells of 256 px."""
    x = _unit(f"x:{tag}", (batch, length, in_chans)).astype(np.float32)
    places = _random(f"c:{tag}").random_sample(batch * length * 2).reshape(batch, length, 2)
    coords = np.floor(places * (ngrids * 256)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(coords)


TINY: dict[str, dict[str, Any]] = {
    "tinyA": dict(depth=3, slide_ngrids=64, segment_lengths=(8, 16, 32, 64, 128)),
    "tinyB": dict(depth=2, slide_ngrids=1000),
}


def tiny_encoder(name: str, **changes: Any) -> LongNetViT:
    """The recorded small encoders: 32 channels, width 64, 4 heads."""
    settings = dict(in_chans=32, embed_dim=64, num_heads=4, **TINY[name])
    model = LongNetViT(**{**settings, **changes})
    model.load_state_dict(recipe_state(model.state_dict()))
    return model.eval()
