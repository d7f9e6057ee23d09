"""Sine-cosine position embeddings of tiles, and checks of their coordinates.

A slide is covered by a grid of `ngrids` x `ngrids` cells of `tile_size` level-0 pixels
(Prov-GigaPath, Methods, "Slide-level pretraining", doi:10.1038/s41586-024-07441-w). The embedding
of a cell concatenates those of its row and its column, half the width each. One table of `ngrids`
rows therefore serves both axes: 1.5 MB, where the table of the whole grid takes 2.86 GiB at width
768.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

OutOfGrid = Literal["error", "original"]

CROWD = 64
"""Mean number of distinct coordinates per occupied cell above which the unit must be wrong: tiles
that overlap by 7/8 of their side reach it, tile indices given as pixels exceed it by far."""

FEW = 5
"""Number of different coordinates, all in a single cell and some only 1 apart, from which on the
unit must be wrong, too."""


def axis_table(ngrids: int, dim: int) -> Tensor:
    """Computes the sine-cosine embeddings of the cells along one axis.

    Section 3.5 of arXiv:1706.03762, with all sines before the cosines. Computed in float64, because
    float32 is off by up to 6e-5.

    Returns:
        float32 `(ngrids, dim)`, on the CPU.

    Raises:
        ValueError: If the width is odd.

    Example:
        >>> axis_table(1000, 384).shape
        torch.Size([1000, 384])
    """
    if dim % 2:
        raise ValueError(f"dim {dim}: expected an even number")
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device="cpu") / half
    frequencies = 1.0 / 10000.0**steps
    places = torch.arange(ngrids, dtype=torch.float64, device="cpu")
    angles = torch.outer(places, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)


def grid_cells(coords: Tensor, tile_size: int) -> Tensor:
    """Returns the grid cells of tiles as int64 columns and rows `(..., 2)`.

    Args:
        coords: `(..., 2)`, x and y in level-0 pixels.
        tile_size: Side of a cell in level-0 pixels.

    Example:
        >>> grid_cells(torch.tensor([[512, 300]]), tile_size=256).tolist()
        [[2, 1]]
    """
    if coords.is_floating_point():
        return torch.floor(coords / tile_size).long()
    return torch.div(coords.long(), tile_size, rounding_mode="floor")


def position_index(coords: Tensor, tile_size: int, ngrids: int = 1000) -> Tensor:
    """Returns the indices `(...)` of tiles in the original's table of the whole grid, unchecked.

    Index 0 is the class token; cells follow column by column. Coordinates beyond the grid give the
    index of another cell, which is why `check_coords` exists.

    Args:
        coords: `(..., 2)`, x and y in level-0 pixels.
        tile_size: Side of a cell in level-0 pixels.
        ngrids: Number of cells along each axis.
    """
    column, row = grid_cells(coords, tile_size).unbind(-1)
    return column * ngrids + row + 1


def check_coords(
    coords: Tensor, tile_size: int, ngrids: int = 1000, what: str = "coords", first: int = 0
) -> None:
    """Checks that the tiles of a slide lie on the grid and that their unit is plausible.

    Args:
        coords: `(num_tiles, 2)`, x and y in level-0 pixels.
        tile_size: Side of a cell in level-0 pixels.
        ngrids: Number of cells along each axis.
        what: Name of the coordinates in errors.
        first: Number of the first tile in errors.

    Raises:
        ValueError: If a coordinate is not finite, negative or beyond the grid, or so many share a
            cell that they cannot be level-0 pixels.
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
    # Packed into one number each, because sorting rows takes a hundred times longer.
    numbers = pairs.to(torch.float64)
    return len((numbers[:, 0] * 2.0**31 + numbers[:, 1]).unique())


def _smallest_gap(coords: Tensor) -> float:
    gaps = [axis.unique().diff() for axis in coords.to(torch.float64).unbind(-1)]
    return min((float(gap.min()) for gap in gaps if len(gap)), default=0.0)


def embed_positions(
    coords: Tensor, table: Tensor, tile_size: int, out_of_grid: OutOfGrid = "error"
) -> Tensor:
    """Looks up the position embeddings of tiles.

    Args:
        coords: `(..., 2)`, x and y in level-0 pixels.
        table: `(ngrids, dim / 2)` from `axis_table`.
        tile_size: Side of a cell in level-0 pixels.
        out_of_grid: `"error"`: the coordinates have been checked to lie on the grid. `"original"`:
            coordinates beyond it get whatever the original's table of the grid has at their index.

    Returns:
        `(..., dim)`, the half of the row first.

    Raises:
        ValueError: If the index is also outside the original's table.
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
