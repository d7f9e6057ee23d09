"""Generates the weights and inputs of the recorded slide encoder outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gigapath.slide_encoder import LongNetViT
from tests.gigapath import golden_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "gigapath"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_json(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def recipe_state(model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any slide encoder, by the names and shapes of its parameters."""
    return {
        name: torch.from_numpy(golden_recipe.parameter(name, tuple(tensor.shape), "w0"))
        for name, tensor in model_state.items()
    }


def recipe_inputs(
    tag: str, batch: int, length: int, in_chans: int, ngrids: int = 1000
) -> tuple[Tensor, Tensor]:
    """Tile embeddings `(B, L, C)` and coordinates `(B, L, 2)` on cells of 256 px."""
    x = golden_recipe.tiles(tag, batch, length, in_chans)
    coords = golden_recipe.coords(tag, batch, length, ngrids=ngrids, tile=256)
    return torch.from_numpy(x), torch.from_numpy(coords).float()


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
