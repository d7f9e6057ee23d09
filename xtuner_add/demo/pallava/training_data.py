"""Dataset of the demo's pairs for PLIP pretraining, used by `configs/pallava/demo_plip.py`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from pallava.engine.plip_pretraining import PLIPPairDataset
from pallava.pairs import RandomQuarterTurn, plain_resize


class SlidePairDataset(PLIPPairDataset):
    """Pairs whose images are rotated and mirrored, but never cropped or scaled.

    A crop of a slide could lack tissue that its caption names, and a scaled field would show nuclei
    at a size that never occurs in sub-images.

    Args:
        pairs_file: The `pairs.jsonl`.
        image_folder: Folder that its paths are relative to.
        image_size: Side of the square output images in pixels.
        options: Arguments of `PLIPPairDataset`.
    """

    def __init__(
        self,
        pairs_file: str | os.PathLike[str],
        image_folder: str | os.PathLike[str] | None = None,
        *,
        image_size: int,
        **options: Any,
    ) -> None:
        from torchvision.transforms import v2

        steps: list[nn.Module] = [
            plain_resize(image_size),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            RandomQuarterTurn(),
        ]
        super().__init__(
            pairs_file,
            image_folder,
            image_size=image_size,
            transform=v2.Compose(steps),
            **options,
        )
