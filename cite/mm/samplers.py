"""Samplers of patches.

Each sampler defines an endless sequence of draws, and draw k belongs to rank k modulo the number of
ranks. A global batch therefore contains the same patches for any number of ranks and workers. (In
the published code the order is part of the data set, so that all workers draw the same patches.) A
resumed run starts the sequence where it stopped, without rereading patches.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

Order = Literal["shuffled", "published"]


class Draw(int):
    """An index into a data set with the number of its draw.

    `PatchDataset` passes the number to the augmentation, so that its random numbers do not depend
    on the worker that reads the patch.
    """

    number: int

    def __new__(cls, index: int, number: int) -> Draw:
        """Creates an index with the number of its draw."""
        draw = super().__new__(cls, index)
        draw.number = number
        return draw

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.number


class DrawSampler(Sampler):
    """Base class of samplers: an endless sequence of draws that is divided among ranks.

    Args:
        dataset: The data set.
        seed: Seed of the sequence; by default a random one that all ranks share.
        infinite: Whether the sampler never ends, for training by iterations. Otherwise an epoch has
            as many draws as there are patches, and the next epoch continues the sequence.
    """

    def __init__(self, dataset: Any, seed: int | None = None, infinite: bool = True) -> None:
        self.dataset = dataset
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        self.infinite = infinite
        self.start = 0

    @abstractmethod
    def draws(self) -> Iterator[int]:
        """Yields indices endlessly, the same in every call and on every rank."""

    def __iter__(self) -> Iterator[int]:
        """Yields the draws of this rank from `start` on."""
        stop = None if self.infinite else self.start + len(self) * self.world_size
        numbered = enumerate(self.draws())
        mine = islice(numbered, self.start + self.rank, stop, self.world_size)
        return (Draw(index, number) for number, index in mine)

    def __len__(self) -> int:
        """Returns the number of draws of this rank per epoch."""
        return -(-len(self.dataset) // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch; has no effect on an infinite sampler."""
        if not self.infinite:
            self.start = epoch * len(self) * self.world_size

    def set_start(self, start: int) -> None:
        """Sets the first draw of the next iteration, counted over all ranks."""
        self.start = start


@DATA_SAMPLERS.register_module()
class ShuffledPatchSampler(DrawSampler):
    """Draws all patches in random order, reshuffled after each pass, as published baselines do."""

    def draws(self) -> Iterator[int]:
        """Yields dataset indices without end."""
        generator = random.Random(self.seed)
        indices = list(range(len(self.dataset)))
        while True:
            generator.shuffle(indices)
            yield from indices


@DATA_SAMPLERS.register_module()
class PatchBalancedSampler(DrawSampler):
    """Alternates between classes; the patches of a class are reshuffled after each pass.

    With the same seed, it draws the same patches as the published code with `patch_balance=True`.

    Args:
        dataset: Data set with `gt_label` and `slide` of each patch.
        seed: Seed of the sequence.
        infinite: See `DrawSampler`.
    """

    def __init__(self, dataset: Any, seed: int | None = None, infinite: bool = True) -> None:
        super().__init__(dataset, seed, infinite)
        self.by_class = group_patches(dataset)

    def draws(self) -> Iterator[int]:
        """Yields dataset indices without end."""
        generator = random.Random(self.seed)
        queues = [[i for slide in slides for i in slide] for slides in self.by_class]
        for queue in queues:
            generator.shuffle(queue)
        positions = [0] * len(queues)
        while True:
            for c, queue in enumerate(queues):
                index = queue[positions[c]]
                positions[c] = (positions[c] + 1) % len(queue)
                if not positions[c]:
                    generator.shuffle(queue)
                yield index


@DATA_SAMPLERS.register_module()
class SlideBalancedSampler(DrawSampler):
    """Alternates between classes, slides of a class, and patches of a slide.

    Args:
        dataset: Data set with `gt_label` and `slide` of each patch.
        seed: Seed of the sequence.
        infinite: See `DrawSampler`.
        order: `shuffled`, or `published` to draw the same patches as the published code with
            `slide_balance=True`, whose first round follows the order of the annotation file.

    Raises:
        ValueError: If `order` is unknown.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int | None = None,
        infinite: bool = True,
        order: Order = "shuffled",
    ) -> None:
        super().__init__(dataset, seed, infinite)
        if order not in ("shuffled", "published"):
            raise ValueError(f"order is {order!r}; expected 'shuffled' or 'published'")
        self.order = order
        self.by_class = group_patches(dataset)

    def draws(self) -> Iterator[int]:
        """Yields dataset indices without end."""
        generator = random.Random(self.seed)
        classes = [[_Slide(list(patches)) for patches in slides] for slides in self.by_class]
        if self.order == "shuffled":
            for slides in classes:
                generator.shuffle(slides)
                for slide in slides:
                    generator.shuffle(slide.patches)
        positions = [0] * len(classes)
        while True:
            for c, slides in enumerate(classes):
                slide = slides[positions[c]]
                index = slide.patches[slide.position]
                slide.position = (slide.position + 1) % len(slide.patches)
                positions[c] = (positions[c] + 1) % len(slides)
                if not slide.position:
                    generator.shuffle(slide.patches)
                if not positions[c]:
                    order = list(range(len(slides)))
                    generator.shuffle(order)
                    slides[:] = [slides[i] for i in order]
                yield index


class _Slide:
    def __init__(self, patches: list[int]) -> None:
        self.patches = patches
        self.position = 0


def group_patches(dataset: Any) -> list[list[list[int]]]:
    """Groups the indices of a dataset by class and by slide, in the order of the annotation file.

    Returns:
        For each class its slides, and for each slide the indices of its patches.

    Raises:
        ValueError: If a class has no slide.
    """
    classes = dataset.metainfo["classes"]
    groups: list[dict[str, list[int]]] = [{} for _ in classes]
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        slide = info.get("slide", info["img_path"])
        groups[int(info["gt_label"])].setdefault(slide, []).append(index)
    for label, group in enumerate(groups):
        if not group:
            raise ValueError(
                f"class {label} ({classes[label]}) has no slide in {dataset.ann_file}; balanced "
                "sampling needs one: add patches of it, or leave the class out"
            )
    return [list(group.values()) for group in groups]
