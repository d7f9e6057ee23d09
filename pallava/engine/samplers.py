"""Batches of samples of similar cost: equal numbers of sub-images and similar length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

MEGABATCHES = 50
"""Number of global batches sorted together, as in XTuner's LengthGroupedSampler."""


def group_by_cost(
    costs: Sequence[tuple[int, int]], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Groups shuffled samples into batches of similar cost.

    Samples are shuffled, sorted by cost within runs of `MEGABATCHES` batches, and split into
    batches, which are shuffled in turn. The most expensive batch comes first, so that running out
    of memory shows immediately. Every sample is in exactly one batch; at most one batch is smaller.

    Args:
        costs: `(number of sub-images, length)` of every sample.
        batch_size: Number of samples per batch over all ranks.
        generator: Random generator of the order.
    """
    order = torch.randperm(len(costs), generator=generator).tolist()
    stretch = max(batch_size, min(MEGABATCHES, len(costs) // (4 * batch_size)) * batch_size)
    batches: list[list[int]] = []
    for start in range(0, len(order), stretch):
        together = sorted(order[start : start + stretch], key=lambda i: costs[i], reverse=True)
        batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    full = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    if full:
        heaviest = max(range(len(full)), key=lambda i: costs[full[i][0]])
        full[0], full[heaviest] = full[heaviest], full[0]
    return full + rest


@DATA_SAMPLERS.register_module()
class SubImageGroupedSampler(Sampler[int]):
    """Groups samples by number of sub-images and by length, with equal work on every rank.

    Args:
        dataset: Dataset with `num_sub_images` and `modality_length`, one integer per sample, such
            as `pallava.dataset.LLaVADataset`.
        per_device_batch_size: Number of samples per batch and rank.
        seed: Seed of the order; by default one that all ranks agree on.
        round_up: Whether to repeat some samples so that all ranks have equally many full batches.

    Raises:
        ValueError: If the dataset is empty or lacks these attributes.
    """

    def __init__(
        self,
        dataset: Sized,
        per_device_batch_size: int,
        seed: int | None = None,
        round_up: bool = True,
    ) -> None:
        for name in ("num_sub_images", "modality_length"):
            if not hasattr(dataset, name):
                raise ValueError(
                    f"SubImageGroupedSampler: {type(dataset).__name__} has no {name}; use "
                    "pallava.dataset.LLaVADataset or mmengine's DefaultSampler"
                )
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.round_up = round_up
        self.per_device_batch_size = per_device_batch_size
        self.costs = list(
            zip(
                (int(count) for count in dataset.num_sub_images),  # type: ignore[attr-defined]
                (abs(int(length)) for length in dataset.modality_length),  # type: ignore[attr-defined]
                strict=True,
            )
        )
        if not self.costs:
            raise ValueError("SubImageGroupedSampler: the dataset is empty")

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's indices, batch by batch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        global_batch = self.per_device_batch_size * self.world_size
        batches = group_by_cost(self.costs, global_batch, generator)
        if self.round_up and len(batches[-1]) < global_batch:
            whole = [index for batch in batches for index in batch]
            missing = global_batch - len(batches[-1])
            batches[-1] = batches[-1] + (whole * math.ceil(missing / len(whole)))[:missing]
        for batch in batches:
            # Samples of similar cost go to different ranks, so that no rank waits for another.
            yield from batch[self.rank :: self.world_size]

    def __len__(self) -> int:
        """Returns the number of this rank's indices."""
        total = len(self.costs)
        if self.round_up:
            global_batch = self.per_device_batch_size * self.world_size
            return math.ceil(total / global_batch) * self.per_device_batch_size
        whole, rest = divmod(total, self.per_device_batch_size * self.world_size)
        share = len(range(self.rank, rest, self.world_size))
        return whole * self.per_device_batch_size + share

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the order depends."""
        self.epoch = epoch
