"""Orders in which patches are drawn, made in the main process.

Every sampler states one endless sequence of draws; draw k belongs to rank k modulo the number of
ranks, so that a global batch holds the same patches on any number of ranks and of workers. A run
that resumes starts the sequence where it stopped, without reading a patch again.
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
    """An index into a dataset that knows which draw of the run it is.

    `PatchDataset` gives the number to the augmentation, whose random numbers then do not depend on
    the worker that reads the patch.
    """

    number: int

    def __new__(cls, index: int, number: int) -> Draw:
        """Makes an index with the number of its draw."""
        draw = super().__new__(cls, index)
        draw.number = number
        return draw

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.number


class DrawSampler(Sampler):
    """One endless sequence of draws, divided among the ranks.

    Args:
        dataset: What is drawn from.
        seed: Of the sequence; by default one that all ranks agree on.
        infinite: Never end, for training by iterations; otherwise end after as many draws as there
            are patches and continue in the next epoch.
    """

    def __init__(self, dataset: Any, seed: int | None = None, infinite: bool = True) -> None:
        self.dataset = dataset
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        self.infinite = infinite
        self.start = 0

    @abstractmethod
    def draws(self) -> Iterator[int]:
        """Yields dataset indices without end, the same at every call and on every rank."""

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's draws, from `start` on."""
        stop = None if self.infinite else self.start + len(self) * self.world_size
        numbered = enumerate(self.draws())
        mine = islice(numbered, self.start + self.rank, stop, self.world_size)
        return (Draw(index, number) for number, index in mine)

    def __len__(self) -> int:
        """Draws of this rank in an epoch: its share of the number of patches."""
        return -(-len(self.dataset) // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Continues where `epoch` begins; without effect on an infinite sampler."""
        if not self.infinite:
            self.start = epoch * len(self) * self.world_size

    def set_start(self, start: int) -> None:
        """Sets the draw, counted over all ranks, that the next iteration begins with."""
        self.start = start


@DATA_SAMPLERS.register_module()
class ShuffledPatchSampler(DrawSampler):
    """Every patch once, shuffled; then again in another order. The published baselines' way."""

    def draws(self) -> Iterator[int]:
        """Yields dataset indices without end."""
        generator = random.Random(self.seed)
        indices = list(range(len(self.dataset)))
        while True:
            generator.shuffle(indices)
            yield from indices


@DATA_SAMPLERS.register_module()
class PatchBalancedSampler(DrawSampler):
    """Classes in turn; within a class every patch once, then again in another order.

    As published (`patch_balance=True`), to the draw, when the seed is the same.

    Args:
        dataset: With `gt_label` and `slide` of every patch.
        seed: Of the sequence.
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
    """Classes in turn, within a class slides in turn, within a slide patches in turn.

    Args:
        dataset: With `gt_label` and `slide` of every patch.
        seed: Of the sequence.
        infinite: See `DrawSampler`.
        order: `published`: the first round takes slides and patches as they stand in the
            annotation file, later ones in another order (`slide_balance=True`, to the draw);
            `shuffled`: shuffled from the first round on.

    Raises:
        ValueError: Another order.
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
        # A slide is its patches and the position of the next one.
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
        For every class the slides, for every slide the indices of its patches.

    Raises:
        ValueError: A class without a slide.
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
