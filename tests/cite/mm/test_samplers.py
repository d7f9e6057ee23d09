from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from cite.mm.samplers import (
    Draw,
    PatchBalancedSampler,
    ShuffledPatchSampler,
    SlideBalancedSampler,
    group_patches,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "cite"
PUBLISHED = json.loads((GOLDEN / "sampling.json").read_text())


class Annotated:
    """The lines of the published case, as a dataset."""

    ann_file = "sampling_ann.txt"
    metainfo = {"classes": ("a", "b", "c")}

    def __init__(self, lines: list[str] | None = None) -> None:
        lines = lines or (GOLDEN / "sampling_ann.txt").read_text().splitlines()
        self.rows = [line.split() for line in lines]

    def __len__(self) -> int:
        return len(self.rows)

    def get_data_info(self, index: int) -> dict[str, Any]:
        name, label = self.rows[index]
        return {"img_path": f"p/{name}", "slide": name.split("_")[0], "gt_label": int(label)}

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(index), index.number  # type: ignore[attr-defined]


def drawn(sampler: Any, count: int) -> list[list[Any]]:
    infos = [sampler.dataset.get_data_info(i) for i in islice(sampler, count)]
    return [[info["img_path"], info["gt_label"]] for info in infos]


@pytest.mark.parametrize("seed", [0, 1])
def test_published_patch_balance(seed: int) -> None:
    sampler = PatchBalancedSampler(Annotated(), seed=seed)
    expected = PUBLISHED[f"patch_balance_seed{seed}"]
    assert drawn(sampler, 60) == expected["draws"]
    assert len(sampler) == expected["len"]


def test_published_slide_balance() -> None:
    sampler = SlideBalancedSampler(Annotated(), seed=0, order="published")
    assert drawn(sampler, 60) == PUBLISHED["slide_balance_seed0"]["draws"]


def test_shuffled_slide_balance_is_balanced_from_the_start() -> None:
    rows = drawn(SlideBalancedSampler(Annotated(), seed=3), 36)
    assert [label for _, label in rows] == [0, 1, 2] * 12
    for start in range(0, 36, 9):
        slides = [name[2:5] for name, label in rows[start : start + 9] if label == 1]
        assert sorted(slides) == ["B01", "B02", "B03"]
    assert rows != drawn(SlideBalancedSampler(Annotated(), seed=4), 36)


def test_every_patch_once_an_epoch() -> None:
    dataset = Annotated()
    sampler = ShuffledPatchSampler(dataset, seed=0, infinite=False)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([int(i) for i in sampler])
        assert sorted(epochs[-1]) == list(range(len(dataset)))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", [PatchBalancedSampler, SlideBalancedSampler, ShuffledPatchSampler])
def test_ranks_divide_one_sequence(kind: type) -> None:
    whole = [int(i) for i in islice(kind(Annotated(), seed=5), 40)]
    for world_size in (2, 4):
        shares = []
        for rank in range(world_size):
            sampler = kind(Annotated(), seed=5)
            sampler.rank, sampler.world_size = rank, world_size
            shares.append([int(i) for i in islice(sampler, 40 // world_size)])
        together = [index for step in zip(*shares, strict=True) for index in step]
        assert together == whole


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_are_the_same_for_any_number_of_workers(num_workers: int) -> None:
    sampler = PatchBalancedSampler(Annotated(), seed=0)
    loader = DataLoader(Annotated(), batch_size=4, sampler=sampler, num_workers=num_workers)
    batches = list(islice(loader, 5))
    names = [sampler.dataset.get_data_info(int(i))["img_path"] for b in batches for i in b[0]]
    assert names == [name for name, _ in PUBLISHED["patch_balance_seed0"]["draws"][:20]]
    assert [int(n) for batch in batches for n in batch[1]] == list(range(20))


@pytest.mark.parametrize("kind", [PatchBalancedSampler, SlideBalancedSampler, ShuffledPatchSampler])
def test_sequence_starts_where_it_stopped(kind: type) -> None:
    whole = list(islice(kind(Annotated(), seed=2), 50))
    sampler = kind(Annotated(), seed=2)
    sampler.set_start(37)
    rest = list(islice(sampler, 13))
    assert rest == whole[37:]
    assert [draw.number for draw in rest] == list(range(37, 50))


def test_draws_reach_other_processes() -> None:
    draw = pickle.loads(pickle.dumps(Draw(7, 123)))
    assert (int(draw), draw.number) == (7, 123)


def test_what_cannot_be_balanced() -> None:
    with pytest.raises(ValueError, match=r"class 1 \(b\) has no slide in sampling_ann.txt"):
        group_patches(Annotated(["A_0.jpg 0", "C_0.jpg 2"]))
    with pytest.raises(ValueError, match="expected 'shuffled' or 'published'"):
        SlideBalancedSampler(Annotated(), order="random")  # type: ignore[arg-type]
