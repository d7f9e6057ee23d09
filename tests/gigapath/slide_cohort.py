"""A synthetic cohort of tile embeddings; some of a slide's tiles reveal its class."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsi.store import write_features

DIM = 16


def write_slide(folder: Path, slide: str, label: int, *, seed: int, tiles: int = 24) -> None:
    generator = np.random.default_rng(seed)
    features = generator.normal(0, 0.5, (tiles, DIM)).astype(np.float32)
    features[: tiles // 2, label] += 3
    coords = np.array([[256 * (n % 6), 256 * (n // 6)] for n in range(tiles)])
    folder.mkdir(parents=True, exist_ok=True)
    write_features(folder / f"{slide}.h5", features, coords, encoder="made-up")


def write_cohort(
    folder: Path, count: int = 40, classes: int = 3, *, patients: int = 0
) -> tuple[Path, Path]:
    """Features and a table; two slides of a patient where patients are asked for."""
    rows = []
    for number in range(count):
        label = number % classes
        write_slide(
            folder / "features", f"S{number:03d}", label, seed=number, tiles=16 + number % 9
        )
        row: dict[str, Any] = {"slide_id": f"S{number:03d}", "label": label}
        if patients:
            row["pat_id"] = f"P{number % patients}"
        rows.append(row)
    return folder / "features", write_table(folder / "labels.csv", rows)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_published_split(folder: Path, table: Path, fold: int = 0) -> Path:
    """`train_0.csv` and so on with an index column, as the original writes them."""
    rows = list(csv.DictReader(table.open()))
    parts = {"train": rows[10:], "val": rows[5:10], "test": rows[:5]}
    for part, own in parts.items():
        numbered = [{"": number, **row} for number, row in enumerate(own)]
        write_table(folder / f"{part}_{fold}.csv", numbered)
    return folder


def write_task(path: Path, classes: int = 3, **fields: Any) -> Path:
    import yaml

    names = {number: number for number in range(classes)}
    content = {"name": "made_up", "setting": "multi_class", "label_dict": names, **fields}
    path.write_text(yaml.safe_dump(content))
    return path
