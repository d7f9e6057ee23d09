from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigapath.pos_embed import (
    axis_table,
    check_coords,
    embed_positions,
    grid_cells,
    position_index,
)
from tests.gigapath.slide_goldens import golden, golden_json

TABLES = golden_json("pos_embed/checksums")["tables"]


def whole_table(ngrids: int, dim: int) -> torch.Tensor:
    """Every cell's embedding, column by column, after a row of zeros."""
    places = torch.arange(ngrids)
    cells = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1).reshape(-1, 2)
    table = embed_positions(cells * 256, axis_table(ngrids, dim // 2), 256)
    return torch.cat([torch.zeros(1, dim), table])


@pytest.mark.parametrize(
    "case",
    [case for case in TABLES if case["ngrids"] < 1000],
    ids=lambda case: f"{case['ngrids']}x{case['dim']}",
)
def test_whole_tables_are_the_original_bit_for_bit(case: dict) -> None:
    table = whole_table(case["ngrids"], case["dim"])
    assert list(table.shape) == case["shape"]
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == case["sha256_f32"]


def test_rows_of_the_released_grid_are_the_original() -> None:
    recorded = golden("pos_embed/tables")
    table = axis_table(1000, 384)
    torch.testing.assert_close(
        embed_positions(index_coords(recorded), table, 256, "original"),
        recorded["table_1000_768_rows"],
        rtol=0,
        atol=0,
    )
    for size in (4, 10):
        dim = {4: 16, 10: 64}[size]
        assert torch.equal(whole_table(size, dim), recorded[f"table_{size}_{dim}"])


def index_coords(recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """Coordinates that have the recorded rows, row 0 included."""
    index = recorded["table_1000_768_rows_index"].long() - 1
    column = torch.div(index, 1000, rounding_mode="floor")
    return torch.stack([column, index - 1000 * column], dim=-1) * 256


@pytest.mark.parametrize("tile_size", [224, 256, 512])
def test_index_is_the_originals_with_its_wrong_rows(tile_size: int) -> None:
    recorded = golden("pos_embed/tables")
    found = position_index(recorded["pos_coords"], tile_size)
    assert torch.equal(found, recorded[f"pos_index_{tile_size}"].long())
    if tile_size == 256:
        whole = position_index(recorded["pos_coords"].long(), tile_size)
        assert torch.equal(whole, recorded["pos_index_256_int64coords"].long())


@given(
    st.integers(1, 600),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63)), min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True),
)
def test_a_position_depends_on_the_cell_only(
    tile_size: int, cells: list[tuple[int, int]], share: float
) -> None:
    corners = torch.tensor(cells) * tile_size
    inside = torch.tensor([int(share * tile_size), tile_size - 1])
    table = axis_table(64, 8)
    assert grid_cells(corners + inside, tile_size).tolist() == [list(cell) for cell in cells]
    assert torch.equal(
        embed_positions(corners, table, tile_size),
        embed_positions((corners + inside).double(), table, tile_size),
    )
    assert torch.equal(
        embed_positions(corners, table, tile_size),
        embed_positions(corners, table, tile_size, "original"),
    )


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ([[0.0, 0.0], [float("nan"), 5.0]], "tile 1 lies at x=nan, y=5;"),
        ([[0.0, float("inf")]], "tile 0 lies at x=0, y=inf"),
        ([[-1.0, 0.0]], "tile 0 lies at x=-1, y=0; expected pixels at level 0 from 0 to 255999"),
        ([[0.0, 256000.0]], "tile 0 lies at x=0, y=256000"),
        ([[256000.0, 0.0]], r"from 0 to 255999 \(tile_size 256 times 1000 cells\)"),
    ],
)
def test_coordinates_that_cannot_be_are_refused(coords: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_coords(torch.tensor(coords), 256)


@pytest.mark.parametrize("side", [3, 20, 300])
def test_indices_of_tiles_are_told_from_pixels(side: int) -> None:
    places = torch.arange(side)
    indices = torch.cartesian_prod(places, places)
    with pytest.raises(ValueError, match=r"expected pixels at level 0\. Multiply indices of tiles"):
        check_coords(indices, 256)
    check_coords(indices * 256, 256)
    check_coords(indices * 64, 256)  # overlap by three quarters


def test_one_tile_and_few_tiles_of_one_cell_are_fine() -> None:
    check_coords(torch.tensor([[3, 5]]), 256)
    check_coords(torch.tensor([[0, 0], [128, 0], [0, 128], [128, 128]]), 256)
    check_coords(torch.zeros(100, 2), 256)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float64])
def test_numbers_of_any_other_width(dtype: torch.dtype) -> None:
    coords = torch.tensor([[0, 0], [60, 100]]).to(dtype)
    check_coords(coords, 256)
    found = embed_positions(coords, axis_table(1000, 8), 32)
    assert torch.equal(found, embed_positions(coords.long(), axis_table(1000, 8), 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cannot_hold_coordinates(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="cannot hold pixels at level 0"):
        check_coords(torch.zeros(3, 2, dtype=dtype), 256)


def test_beyond_the_originals_table() -> None:
    table = axis_table(10, 8)
    # y of 10 cells takes the next column's first row; -1 in x counts from the table's end.
    coords = torch.tensor([[0, 2560], [256, 0]])
    first, second = embed_positions(coords, table, 256, "original")
    assert torch.equal(first, second)
    assert not embed_positions(torch.tensor([[0, -256]]), table, 256, "original").any()
    with pytest.raises(ValueError, match="row 101 of a table of 101"):
        embed_positions(torch.tensor([[2560, 0]]), table, 256, "original")


def test_odd_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="dim 7"):
        axis_table(10, 7)
