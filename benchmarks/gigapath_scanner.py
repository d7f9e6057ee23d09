"""How far the slide vector depends on the scanner, for each preset and grid.

    python -m benchmarks.gigapath_scanner

The same tissue scanned at 20x and at 40x has the same tiles at level-0 coordinates that differ by a
factor of two. Tile embeddings are identical, so that only positions differ; the slide encoder has
GigaPath-Flash's size and random weights.
"""

from __future__ import annotations

import numpy as np
import torch

from gigapath.embed.slide_vectors import (
    PRESETS,
    describe_slide_encoder,
    open_slide_encoder,
    slide_vector,
)

WIDTH, COLUMNS, ROWS = 384, 19, 13


def cosines(columns: int = COLUMNS, rows: int = ROWS) -> dict[str, float]:
    """Returns the cosine of both scans' vectors by preset, and for `mean` on the other grid."""
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    cells = np.stack([x.ravel(), y.ravel()], 1).astype(np.int64)
    features = np.random.default_rng(0).normal(size=(len(cells), WIDTH)).astype(np.float32)
    found = {}
    for name, grid_px in (*((preset, None) for preset in PRESETS), ("mean", 256)):
        spec = describe_slide_encoder("random", WIDTH, preset=name, grid_px=grid_px)
        model = open_slide_encoder(spec)
        one, other = (
            torch.from_numpy(slide_vector(model, features, cells * side, side, spec, f"{side}"))
            for side in (256, 512)
        )
        similarity = torch.nn.functional.cosine_similarity(one, other, dim=0)
        found[name if grid_px is None else f"{name} --grid-px {grid_px}"] = float(similarity)
    return found


def main() -> None:
    """Prints one line for each preset."""
    for name, cosine in cosines().items():
        print(f"{name:20} {cosine:.3f}")


if __name__ == "__main__":
    main()
