"""Slides with different numbers of tiles in one batch, and one vector from each.

Shapes: B slides, L tiles of the longest, C channels of a tile embedding, D width of the encoder,
T tokens of all slides together, each slide's class token before its tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["cls", "mean"]


def batched(x: Tensor, coords: Tensor, in_chans: int) -> tuple[Tensor, Tensor]:
    """Checks shapes, and makes one slide a batch of one.

    Args:
        x: `(B, L, C)` or `(L, C)`, tile embeddings.
        coords: `(B, L, 2)` or `(L, 2)`.
        in_chans: C.

    Raises:
        ValueError: The shapes do not fit, or there are no tiles.
    """
    if x.dim() not in (2, 3) or x.shape[-1] != in_chans:
        raise ValueError(f"x {tuple(x.shape)}: expected (B, L, {in_chans}) or (L, {in_chans})")
    if coords.shape != (*x.shape[:-1], 2):
        expected = (*x.shape[:-1], 2)
        raise ValueError(
            f"coords {tuple(coords.shape)}: expected {expected} for x {tuple(x.shape)}"
        )
    if not x.shape[:-1].numel():
        raise ValueError(f"x {tuple(x.shape)}: no tiles; leave slides without tissue out")
    return (x, coords) if x.dim() == 3 else (x.unsqueeze(0), coords.unsqueeze(0))


def slide_lengths(
    x: Tensor, padding_mask: Tensor | None, lengths: Sequence[int] | Tensor | None
) -> list[int]:
    """Number of tiles of each slide of a batch.

    Args:
        x: `(B, L, C)`.
        padding_mask: `(B, L)`, true where there is no tile.
        lengths: B numbers.

    Raises:
        ValueError: Both are given, shapes differ, tiles follow padding, or a slide has no tile.
    """
    batch, longest = x.shape[:2]
    if padding_mask is not None and lengths is not None:
        raise ValueError("padding_mask and lengths: give one of them")
    if padding_mask is not None:
        if padding_mask.shape not in {(batch, longest), (longest,)} or (
            padding_mask.dim() == 1 and batch != 1
        ):
            raise ValueError(
                f"padding_mask {tuple(padding_mask.shape)}: expected {(batch, longest)}"
            )
        real = ~padding_mask.bool().reshape(batch, longest)
        if bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ValueError(
                "padding_mask: tiles follow padding; it must be true where there is no tile, at "
                "the end of a slide"
            )
        lengths = real.sum(1)
    if lengths is None:
        return [longest] * batch
    counts = [int(count) for count in lengths]
    if len(counts) != batch:
        raise ValueError(f"lengths: {len(counts)} numbers for {batch} slides")
    for number, count in enumerate(counts):
        if not 1 <= count <= longest:
            raise ValueError(f"slide {number} has {count} tiles: expected 1 to {longest}")
    return counts


def pool(state: Tensor, sizes: Sequence[int], pooling: Pooling) -> Tensor:
    """One vector of each slide.

    Args:
        state: `(T, D)`, class token and tiles of the slides one after the other.
        sizes: Number of tokens of each slide.
        pooling: `"cls"`, the class token; `"mean"`, the mean of the tiles.

    Returns:
        `(B, D)`.

    Raises:
        ValueError: There is no such pooling.
    """
    if pooling == "cls":
        return torch.stack([slide[0] for slide in state.split(list(sizes))])
    if pooling == "mean":
        return torch.stack([slide[1:].mean(0) for slide in state.split(list(sizes))])
    raise ValueError(f"pooling {pooling!r}: expected 'cls' or 'mean'")
