"""Batches of equal cost: every sample once, the same work on every rank, the heaviest first."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.dataset import DefaultSampler

from pallava.engine.samplers import SubImageGroupedSampler, group_by_cost


class Costs:
    """What a sampler asks of a data set."""

    def __init__(self, costs: list[tuple[int, int]]) -> None:
        self.num_sub_images = [count for count, _ in costs]
        # XTuner gives texts without an image a negative length.
        self.modality_length = [length if count else -length for count, length in costs]

    def __len__(self) -> int:
        return len(self.num_sub_images)


costs_of_samples = st.lists(
    st.tuples(st.sampled_from([0, 4, 5, 6, 7, 8]), st.integers(1, 500)), min_size=1, max_size=120
)


def sampler(
    costs: list[tuple[int, int]], batch: int, rank: int = 0, world_size: int = 1, **more: object
) -> SubImageGroupedSampler:
    made = SubImageGroupedSampler(Costs(costs), per_device_batch_size=batch, seed=3, **more)
    made.rank, made.world_size = rank, world_size
    return made


@given(costs_of_samples, st.integers(1, 7), st.integers(0, 5))
def test_every_sample_is_in_one_batch(
    costs: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    batches = group_by_cost(costs, batch_size, torch.Generator().manual_seed(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(costs)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@given(costs_of_samples, st.integers(1, 7), st.integers(0, 5))
def test_the_most_expensive_full_batch_comes_first(
    costs: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    batches = group_by_cost(costs, batch_size, torch.Generator().manual_seed(seed))
    full = [batch for batch in batches if len(batch) == batch_size]
    dearest = [max(costs[index] for index in batch) for batch in full]
    assert not full or dearest[0] == max(dearest)


@given(costs_of_samples, st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_ranks_share_the_samples(
    costs: list[tuple[int, int]], batch: int, world_size: int, round_up: bool
) -> None:
    ranks = [
        sampler(costs, batch, rank, world_size, round_up=round_up) for rank in range(world_size)
    ]
    shares = [list(one) for one in ranks]
    assert [len(share) for share in shares] == [len(one) for one in ranks]
    seen = Counter(index for share in shares for index in share)
    assert set(seen) == set(range(len(costs)))
    if round_up:
        assert len(set(map(len, shares))) == 1
        assert len(shares[0]) % batch == 0
        repeated = sum(seen.values()) - len(costs)
        assert 0 <= repeated < batch * world_size
    else:
        assert set(seen.values()) == {1}


@given(costs_of_samples, st.integers(1, 4))
@settings(deadline=None)
def test_the_order_depends_on_seed_and_epoch_alone(
    costs: list[tuple[int, int]], batch: int
) -> None:
    first, second = sampler(costs, batch), sampler(costs, batch)
    assert list(first) == list(first) == list(second)
    first.set_epoch(1)
    other = list(first)
    second.set_epoch(1)
    assert list(second) == other
    second.set_epoch(0)
    assert list(second) == list(sampler(costs, batch))


def many_costs(number: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(4, 9, (number,), generator=generator).tolist()
    return list(
        zip(counts, torch.randint(20, 400, (number,), generator=generator).tolist(), strict=True)
    )


def test_epochs_differ() -> None:
    one = sampler(many_costs(100), 4)
    orders = []
    for epoch in range(3):
        one.set_epoch(epoch)
        orders.append(tuple(one))
    assert len(set(orders)) == 3


def waste(costs: list[tuple[int, int]], order: list[int], batch: int) -> float:
    """Fraction of copies if every batch were padded to its largest number of sub-images."""
    padded = 0
    for start in range(0, len(order), batch):
        counts = [costs[index][0] for index in order[start : start + batch]]
        padded += len(counts) * max(counts)
    return 1 - sum(costs[index][0] for index in order) / padded


def test_batches_are_of_equal_cost() -> None:
    costs = many_costs(2400)
    grouped = list(sampler(costs, 6))
    plain = list(DefaultSampler(Costs(costs), shuffle=True, seed=3))
    assert waste(costs, plain, 6) > 0.15
    assert waste(costs, grouped, 6) < 0.02


def test_ranks_of_a_step_have_equal_cost() -> None:
    costs = many_costs(960)
    shares = [list(sampler(costs, 6, rank, 4)) for rank in range(4)]
    spread = []
    for start in range(0, len(shares[0]), 6):
        step = [sum(costs[i][0] for i in share[start : start + 6]) for share in shares]
        spread.append(max(step) - min(step))
    assert sum(spread) / len(spread) < 2  # of 24 to 48 sub-images


def test_a_data_set_without_costs_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"list has no num_sub_images; use pallava\.dataset"):
        SubImageGroupedSampler([1, 2], per_device_batch_size=2)
    with pytest.raises(ValueError, match="the dataset is empty"):
        SubImageGroupedSampler(Costs([]), per_device_batch_size=2)


def test_a_data_set_and_its_loader_agree(tmp_path: object) -> None:
    from torch.utils.data import DataLoader

    costs = many_costs(50)
    grouping = sampler(costs, 6)
    loader = DataLoader(range(50), batch_size=6, sampler=grouping)
    batches = [batch.tolist() for batch in loader]
    assert len(batches) == len(loader) == 9
    assert {len(batch) for batch in batches} == {6}
    heaviest = max(max(costs[index] for index in batch) for batch in batches)
    assert max(costs[index] for index in batches[0]) == heaviest
