"""The changes to open_clip's trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pathgen.clip.shards import prepare_shards
from pathgen.clip.worker import (
    note_on_cut_captions,
    samples_in_seeded_order,
    shards_without_end_marks,
)
from tests.pathgen.histology import write_pairs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("order")
    return prepare_shards(write_pairs(folder / "pairs", 10), folder / "data")


def order(shards: Any, *, seed: int, epochs: int, first: int = 0) -> list[list[str]]:
    """Captions as the trainer's pipeline gives them, by epoch."""
    from open_clip_train.data import get_data
    from open_clip_train.params import parse_args

    args = parse_args(
        [
            *("--train-data", shards.urls, "--train-num-samples", str(shards.total)),
            *("--dataset-type", "webdataset", "--workers", "0", "--batch-size", "4"),
            *("--seed", str(seed)),
        ]
    )
    args.rank, args.world_size, args.distributed = 0, 1, False
    with shards_without_end_marks(), samples_in_seeded_order():
        data = get_data(args, (str, str), epoch=first, tokenizer=lambda text: [text])["train"]
        found = []
        for epoch in range(first, first + epochs):
            data.set_epoch(epoch)
            found.append([text for _, texts in data.dataloader for text in texts])
    return found


def test_the_order_of_samples_follows_seed_and_epoch(shards: Any) -> None:
    first = order(shards, seed=1, epochs=2)
    assert sorted(first[0]) == sorted(first[1])
    assert len(first[0]) == shards.total
    assert first[0] != first[1]
    assert order(shards, seed=1, epochs=2) == first
    assert order(shards, seed=1, epochs=1, first=1) == first[1:], "as after a resume"
    assert order(shards, seed=2, epochs=1) != first[:1]


def test_the_trainer_is_left_as_it_was(shards: Any) -> None:
    from open_clip_train import data

    before = (data.get_wds_dataset, data.wds.shuffle, data.SharedEpoch)
    order(shards, seed=1, epochs=1)
    assert (data.get_wds_dataset, data.wds.shuffle, data.SharedEpoch) == before


def test_cut_captions_are_told(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, 3)
    (shard,) = prepare_shards(pairs, tmp_path / "short").paths
    assert note_on_cut_captions(shard, "ViT-B-32") == ""
    assert "12 of the first 12 captions" in note_on_cut_captions(
        shard, "ViT-B-32", context_length=6
    )

    pairs.write_text(pairs.read_text().replace("shows fat", "shows " + "fat and " * 40 + "stroma"))
    (shard,) = prepare_shards(pairs, tmp_path / "long").paths
    assert note_on_cut_captions(shard, "ViT-B-32") == (
        "3 of the first 12 captions have more tokens than the 77 that ViT-B-32 reads: their ends "
        "are cut"
    )
