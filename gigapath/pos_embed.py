"""Positions of tiles on a slide: checked coordinates, and sine-cosine embeddings of their cells.

A slide lies on a grid of `ngrids` x `ngrids` cells of `tile_size` pixels at level 0 (Prov-GigaPath,
Methods, "Slide-level pretraining", doi:10.1038/s41586-024-07441-w). The position of a cell is the
sine-cosine embedding of its row beside that of its column, half the width each, so a table of
`ngrids` rows serves both axes: 1.5 MB where the whole grid's table takes 2.86 GiB at width 768.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

OutOfGrid = Literal["error", "original"]

CROWD = 64
"""Mean number of different coordinates in an occupied cell above which the unit is taken to be
wrong: tiles that overlap by 7/8 of their side reach it, indices of tiles exceed it by far."""

FEW = 5
"""Different coordinates in one single cell, next to each other, from which on it is as well."""


def axis_table(ngrids: int, dim: int) -> Tensor:
    """Sine-cosine embeddings of the places along one axis.

    Attention Is All You Need, section 3.5 (arXiv:1706.03762), sines first, then cosines; computed
    in float64, as float32 is off by up to 6e-5.

    Args:
        ngrids: Number of places.
        dim: Width, even.

    Returns:
        `(ngrids, dim)` in float32, on the CPU.

    Raises:
        ValueError: The width is odd.
    """
    if dim % 2:
        raise ValueError(f"width {dim} of an axis: expected an even number")
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device="cpu") / half
    frequencies = 1.0 / 10000.0**steps
    places = torch.arange(ngrids, dtype=torch.float64, device="cpu")
    angles = torch.outer(places, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)


def grid_cells(coords: Tensor, tile_size: int) -> Tensor:
    """Cells of the grid in which tiles lie.

    Args:
        coords: `(..., 2)`, x and y in pixels at level 0.
        tile_size: Side of a cell in pixels at level 0.

    Returns:
        `(..., 2)`, column and row, int64.
    """
    if coords.is_floating_point():
        return torch.floor(coords / tile_size).long()
    return torch.div(coords.long(), tile_size, rounding_mode="floor")


def position_index(coords: Tensor, tile_size: int, ngrids: int = 1000) -> Tensor:
    """Rows of the whole grid's table as the original counts them, unchecked.

    Row 0 is the class token's; cells follow column by column. Beyond the grid, rows are those of
    other cells: the reason why `check_coords` exists.

    Args:
        coords: `(..., 2)`, x and y in pixels at level 0.
        tile_size: Side of a cell in pixels at level 0.
        ngrids: Cells along an axis.

    Returns:
        `(...)`, int64.
    """
    column, row = grid_cells(coords, tile_size).unbind(-1)
    return column * ngrids + row + 1


def check_coords(
    coords: Tensor, tile_size: int, ngrids: int = 1000, what: str = "coords", first: int = 0
) -> None:
    """Checks that tiles of one slide lie on the grid and that the unit can be right.

    Args:
        coords: `(num_tiles, 2)`, x and y in pixels at level 0.
        tile_size: Side of a cell in pixels at level 0.
        ngrids: Cells along an axis.
        what: The name of the coordinates in a message.
        first: Number of the first tile in a message.

    Raises:
        ValueError: A coordinate is not a number, negative or beyond the grid, or so many lie in a
            cell that they cannot be pixels.
    """
    if coords.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{what}: {coords.dtype} cannot hold pixels at level 0; give integers or float32"
        )
    if not coords.is_floating_point():
        coords = coords.long()
    bad = ~torch.isfinite(coords) | (coords < 0) | (coords >= tile_size * ngrids)
    if bool(bad.any()):
        index = int(bad.any(-1).nonzero()[0, 0])
        x, y = coords[index].tolist()
        raise ValueError(
            f"{what}: tile {first + index} lies at x={x:g}, y={y:g}; expected pixels at level 0 "
            f"from 0 to {tile_size * ngrids - 1} (tile_size {tile_size} times {ngrids} cells)"
        )
    different = _count_different(coords)
    cells = _count_different(grid_cells(coords, tile_size))
    crowded = different > CROWD * cells
    if crowded or (cells == 1 and different >= FEW and _smallest_gap(coords) <= 1):
        raise ValueError(
            f"{what}: {different} different coordinates up to {float(coords.max()):g} lie in "
            f"{cells} cell{'s' * (cells > 1)} of {tile_size} px: expected pixels at level 0. "
            "Multiply indices of tiles by the tile size, and coordinates of another level by its "
            "downsampling"
        )


def _count_different(pairs: Tensor) -> int:
    # As one number each: sorting rows takes a hundred times longer.
    numbers = pairs.to(torch.float64)
    return len((numbers[:, 0] * 2.0**31 + numbers[:, 1]).unique())


def _smallest_gap(coords: Tensor) -> float:
    gaps = [axis.unique().diff() for axis in coords.to(torch.float64).unbind(-1)]
    return min((float(gap.min()) for gap in gaps if len(gap)), default=0.0)


def embed_positions(
    coords: Tensor, table: Tensor, tile_size: int, out_of_grid: OutOfGrid = "error"
) -> Tensor:
    """Position embeddings of tiles.

    Args:
        coords: `(..., 2)`, x and y in pixels at level 0.
        table: `(ngrids, dim / 2)` of `axis_table`.
        tile_size: Side of a cell in pixels at level 0.
        out_of_grid: `"error"`: coordinates were checked to lie on the grid. `"original"`: what
            lies beyond it takes the row that the original's whole table has at that index.

    Returns:
        `(..., dim)`, the row's half first.

    Raises:
        ValueError: The original has no row there either.
    """
    ngrids = len(table)
    if out_of_grid == "error":
        column, row = grid_cells(coords, tile_size).unbind(-1)
        return torch.cat([table[row], table[column]], dim=-1)
    index = position_index(coords, tile_size, ngrids)
    rows = ngrids * ngrids + 1
    outside = (index < -rows) | (index >= rows)
    if bool(outside.any()):
        found = int(index[outside][0])
        raise ValueError(f"coords: row {found} of a table of {rows}: no position in the original")
    index = index % rows
    cell = (index - 1).clamp(min=0)
    column, row = torch.div(cell, ngrids, rounding_mode="floor"), cell % ngrids
    embedded = torch.cat([table[row], table[column]], dim=-1)
    return embedded.masked_fill((index == 0).unsqueeze(-1), 0.0)
