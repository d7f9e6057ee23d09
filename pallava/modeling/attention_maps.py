"""Attention maps of the connector over sub-images or tiles, for visualisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pallava.modeling.qformer import ScaleInvariantConnector
from pallava.slide_bags import SlideBag


@torch.no_grad()
def sub_image_attention(model: Any, pixel_values: Tensor) -> Tensor | None:
    """Returns the mean attention of an image's thumbnail tokens to its sub-images.

    The forward pass uses SDPA, which never materialises the attention weights. Forward hooks
    therefore record the queries and keys of every cross-attention, and `softmax(QK^T / sqrt(d))`
    (Vaswani et al. 2017, arXiv:1706.03762, equation 1) is averaged over thumbnail tokens, heads and
    layers.

    Args:
        model: Module with `encode_images` and `projector`, for instance `PALLaVA`.
        pixel_values: One image, `(1 + num_sub_images, 3, S, S)`, the thumbnail first.

    Returns:
        `(num_sub_images, side, side)` with sum 1, where `side**2` is the number of visual tokens
        per tile; None if the connector does not use sub-images or the image has none.
    """
    connector = model.projector
    num_sub_images = len(pixel_values) - 1
    if (
        not isinstance(connector, ScaleInvariantConnector)
        or not connector.uses_sub_images
        or num_sub_images == 0
    ):
        return None
    tokens = _cross_attention(model, pixel_values)
    side = math.isqrt(tokens.numel() // num_sub_images)
    return tokens.view(num_sub_images, side, side)


@torch.no_grad()
def tile_attention(model: Any, bag: SlideBag) -> Tensor | None:
    """Returns the mean attention of the slide tokens to the tiles; see `sub_image_attention`.

    Args:
        model: Model with a `SlideTokenEncoder`.
        bag: Tile features of the slide.

    Returns:
        `(num_tiles,)` with sum 1; None if the connector does not use tiles.
    """
    connector = model.projector
    if not isinstance(connector, ScaleInvariantConnector) or not connector.uses_sub_images:
        return None
    return _cross_attention(model, bag)


def _cross_attention(model: Any, image: Any) -> Tensor:
    """Computes mean attention to each sub-image token of one image from hooked queries and keys."""
    connector, queries, keys = model.projector, list[Tensor](), list[Tensor]()
    handles = []
    for name, module in connector.named_modules():
        for part, outputs in (("query", queries), ("key", keys)):
            if name.endswith(f".crossattention.self.{part}"):
                handles.append(module.register_forward_hook(_collect(outputs)))
    was_training = model.training
    model.eval()
    try:
        model.encode_images([image])
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    heads = connector.config.num_attention_heads
    maps = [_average(query, key, heads) for query, key in zip(queries, keys, strict=True)]
    return torch.stack(maps).mean(dim=0)


def _collect(outputs: list[Tensor]) -> Any:
    def hook(module: object, inputs: object, output: Tensor) -> None:
        del module, inputs
        outputs.append(output)

    return hook


def _average(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Averages the attention of query `(1, T, D)` to key `(n, t, D)`; returns `(n * t,)`."""
    query, key = (
        tensor.flatten(0, 1).float().unflatten(-1, (heads, -1)).transpose(0, 1)
        for tensor in (query, key)
    )
    means = [  # head by head, since the scores of 100,000 tiles are large
        (queries @ keys.T / math.sqrt(query.shape[-1])).softmax(dim=-1).mean(dim=0)
        for queries, keys in zip(query, key, strict=True)
    ]
    return torch.stack(means).mean(dim=0)
