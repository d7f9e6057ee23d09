"""Regions of a slide's map hold what their questions say, by the polygons themselves."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import shapely

from benchmarks.slide_evidence import tiles_asked_about
from benchmarks.slide_map import (
    _CLASSES,
    _PAIRS,
    BLOCK_TILES,
    IN_FEATURES,
    NAMES,
    TILE_PX,
    Region,
    RegionMap,
    _is_held_out,
    make_data,
    read_regions,
    reader_accuracy,
    vocabulary,
)
from pallava.slide_bags import read_bag

ROWS, COLUMNS = 128, 128


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a map of 2 x 2 blocks: stroma with discs of the other kinds."""
    rng = np.random.default_rng(0)
    size = np.array([COLUMNS, ROWS]) * TILE_PX
    rest, tissue, classes = shapely.box(0, 0, *size), [], []
    for _ in range(700):
        kind = str(rng.choice(["tumor", "necrosis", "omental_fat", "hemorragia"]))
        disc = shapely.Point(rng.uniform(0, size)).buffer(rng.uniform(100, 700), quad_segs=6)
        part = shapely.intersection(disc, rest)
        rest = shapely.difference(rest, disc)
        if part.area:
            tissue += [part]
            classes += [kind]
    nuclei = shapely.points(rng.uniform(0, size, (60_000, 2))).tolist()
    kinds = rng.choice(
        ["inflammatory", "neoplastic", "connective"], len(nuclei), p=(0.02, 0.9, 0.08)
    )
    path = tmp_path_factory.mktemp("package") / "histolytics-0.3.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, shapes, labels in (
            ("hgsc_tissue_wsi", [*tissue, rest], [*classes, "stroma"]),
            ("hgsc_nuclei_wsi", nuclei, kinds.tolist()),
        ):
            table = pyarrow.table({"geometry": shapely.to_wkb(shapes), "class_name": labels})
            pyarrow.parquet.write_table(table, path.parent / "table.parquet")
            archive.write(path.parent / "table.parquet", f"histolytics/data/{name}.parquet")
    return path


@pytest.fixture(scope="module")
def region_map(wheel: Path) -> RegionMap:
    return RegionMap.read(wheel)


def polygons(wheel: Path, region: Region) -> dict[str, shapely.Geometry]:
    """The kinds in a region, cut from the whole polygons by shapely, without tiles."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open("histolytics/data/hgsc_tissue_wsi.parquet") as file,
    ):
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read()))
    shapes = shapely.from_wkb(table["geometry"].to_numpy())
    classes = np.array(table["class_name"].to_pylist())
    left, top = region.left * TILE_PX, region.top * TILE_PX
    frame = shapely.box(left, top, left + region.columns * TILE_PX, top + region.rows * TILE_PX)
    return {
        name: shapely.intersection(shapely.union_all(shapes[classes == of]), frame)
        for name, of in zip(NAMES, _CLASSES, strict=True)
    }


@pytest.mark.parametrize("number", range(6))
def test_answers_are_those_of_the_polygons(number: int, wheel: Path, region_map: RegionMap) -> None:
    region = region_map.draw(np.random.default_rng(number), held_out=bool(number % 2))
    held = polygons(wheel, region)
    total = sum(shape.area for shape in held.values())
    areas = region.seen(region_map.areas)
    for kind, shape in enumerate(held.values()):
        assert areas[..., kind].sum() * TILE_PX**2 == pytest.approx(shape.area, rel=1e-3, abs=1)
    asked = {q.text: q.answer for q in region_map.questions(region)}
    assert asked and all(answer in vocabulary()[text] for text, answer in asked.items())
    for name in ("tumour", "necrosis", "fat", "haemorrhage"):
        answer = asked.get(f"Does the slide show {name}?")
        if answer is not None:
            assert (held[name].area > 0) == (answer == "yes")
    for one, other in _PAIRS:
        answer = asked.get(f"Does {NAMES[one]} touch {NAMES[other]}?")
        gap = shapely.distance(held[NAMES[one]], held[NAMES[other]])
        if answer is not None:
            assert gap <= 8 if answer == "yes" else gap >= TILE_PX
    share = held["tumour"].area / total
    low, high = {"little": (0.01, 0.2), "some": (0.3, 0.5), "much": (0.6, 1.0)}.get(
        asked.get("How much of the tissue is tumour?", ""), (0, 1)
    )
    assert low - 1e-3 <= share <= high + 1e-3


def test_contact_is_read_from_tiles_without_noise(region_map: RegionMap) -> None:
    assert reader_accuracy(region_map, 0.0, 150, seed=0) > 0.9
    assert reader_accuracy(region_map, 3.0, 150, seed=0) < 0.75


def test_where_follows_turns_and_mirrors(region_map: RegionMap) -> None:
    """A point that is turned with the region stays on the tile that it was on."""
    marks = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    plain = Region(3, 5, 10, 14).seen(marks)
    assert plain[0, 0] == 3 * COLUMNS + 5 and plain.shape == (10, 14)
    turned = Region(3, 5, 10, 14, turns=1).seen(marks)
    assert turned.shape == (14, 10) and turned[-1, 0] == plain[0, 0]
    assert Region(3, 5, 10, 14, mirrored=True).seen(marks)[0, 0] == plain[0, -1]


def test_regions_for_training_and_questions_lie_in_different_blocks(
    region_map: RegionMap,
) -> None:
    blocks = _is_held_out(region_map.shape)
    assert 0.2 <= blocks.mean() <= 0.3
    rng = np.random.default_rng(1)
    for held_out in (False, True):
        for _ in range(50):
            region = region_map.draw(rng, held_out)
            tops = np.array([region.top, region.top + region.rows - 1]) // BLOCK_TILES
            lefts = np.array([region.left, region.left + region.columns - 1]) // BLOCK_TILES
            assert (blocks[np.ix_(tops, lefts)] == held_out).all()


def test_files(wheel: Path, region_map: RegionMap, tmp_path: Path) -> None:
    shutil.copy(wheel, tmp_path)  # instead of a download
    make_data(tmp_path, seed=3, num_train=12, num_held_out=40)
    again, regions = read_regions(tmp_path)
    assert (again.areas == region_map.areas).all()
    name = "held_out_00007"
    bag = read_bag(tmp_path / "features" / f"{name}.h5", in_features=IN_FEATURES)
    areas = regions[name].seen(region_map.areas)
    assert len(bag.features) == (areas.sum(axis=-1) >= 0.5).sum()
    assert (bag.positions.numpy() < areas.shape[1::-1]).all()
    held_out = list(map(json.loads, (tmp_path / "held_out.jsonl").open()))
    counts = Counter((row["question"], row["answer"]) for row in held_out)
    assert counts and all(row["slide"].startswith("held_out") for row in held_out)
    for text in {row["question"] for row in held_out}:
        assert len({counts[text, answer] for answer in vocabulary()[text]}) == 1
    assert {row["block"] for row in held_out} <= {f"{r}-{c}" for r in (0, 1) for c in (0, 1)}
    fat = {"question": "In which quarter is the fat?"}
    columns, lines = bag.positions.long().T.numpy()
    expected = areas[lines, columns, NAMES.index("fat")] >= 0.1
    assert (tiles_asked_about(fat, bag, areas).numpy() == expected).all()
    rows = list(map(json.loads, (tmp_path / "conversations.jsonl").open()))
    assert rows and all(row["slide"].startswith("train") for row in rows)
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows)
