"""Files of tile features as tile encoders write them, by h5py alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

TILE_PX = 512


def write_bag(
    path: Path,
    num_tiles: int = 12,
    width: int = 32,
    seed: int = 0,
    attributes: dict[str, Any] | None = None,
    **datasets: Any,
) -> Path:
    """Writes a bag on a grid four tiles wide; `datasets` replaces arrays, None omits one."""
    rng = np.random.default_rng(seed)
    places = np.stack([np.arange(num_tiles) % 4, np.arange(num_tiles) // 4], axis=1)
    arrays: dict[str, Any] = {
        "features": rng.standard_normal((num_tiles, width)).astype(np.float32),
        "coords": (places + 3) * TILE_PX,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["encoder"] = "some-encoder"
        for name, values in (arrays | datasets).items():
            if values is not None:
                file.create_dataset(name, data=values)
        if "coords" in file:
            file["coords"].attrs.update(
                {"patch_size_level0": TILE_PX} if attributes is None else attributes
            )
    return path
