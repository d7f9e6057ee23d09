"""Tile embeddings in the published layout of PatchCamelyon."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch

from pathcore.rows import write_csv


def write_tiles(folder: Path, signal: float = 4.0) -> Path:
    """Writes `tiles.zip`, embeddings of two classes that are `signal` apart, and `tiles.csv`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    with zipfile.ZipFile(folder / "tiles.zip", "w") as archive:
        for number in range(100):
            vector = torch.randn(8, generator=generator)
            vector[number % 2] += signal
            stream = io.BytesIO()
            torch.save(vector, stream)
            split = ("train", "train", "train", "val", "test")[number % 5]
            archive.writestr(f"pcam/{split}/t{number}.pt", stream.getvalue())
            rows.append((f"t{number}", number % 2, split))
    write_csv(folder / "tiles.csv", ["input", "label", "split"], rows)
    return folder
