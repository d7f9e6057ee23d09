"""A synthetic PatchGastric folder in the real layout: captions.csv, patches_captions, splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cite.splits import choose_slides, published_names, read_captions, split_slides, write_patches

SUBTYPES = (
    "Well differentiated tubular adenocarcinoma",
    "Moderately differentiated tubular adenocarcinoma",
    "Poorly differentiated adenocarcinoma, non-solid type",
)
HUES = ((200, 60, 60), (60, 200, 60), (60, 60, 200))
"""A colour for each class, so that a few steps learn to tell them apart."""


def make_gastric(
    root: Path, *, slides: int = 5, patches: int = 3, size: int = 40, seed: int = 0
) -> Path:
    """Makes `root/data` and returns it; 40 % of the slides train."""
    generator = np.random.default_rng(seed)
    data = root / "data"
    folder = data / "patches_captions"
    folder.mkdir(parents=True)
    rows = ["id,subtype,text"]
    for label, subtype in enumerate(SUBTYPES):
        for slide in range(slides):
            name = f"{label}{slide:x}{label}{slide:x}"
            rows.append(f'{name},"{subtype}","a caption, made up"')
            # Unequal numbers, so that the choice of slides has no ties.
            for patch in range(patches + slide % 3):
                pixels = np.array(HUES[label]) + generator.normal(0, 30, (size, size, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{name}_{patch}.jpg")
    (data / "captions.csv").write_text("\n".join(rows) + "\n")
    split = split_slides(
        read_captions(data / "captions.csv"), sorted(p.name for p in folder.iterdir()), val=0.6
    )
    annotations = data / "gastric_cls3_ann"
    write_patches(annotations / "val_0.8.txt", split.val)
    write_patches(annotations / "train_all_0.2.txt", split.train)
    for number in (1, 2, 4, 8, 16):
        write_patches(
            annotations / published_names(0.8, number), choose_slides(split.train, number)
        )
    return data
