"""Batches against the goldens, and mixtures of samples with and without images."""

from __future__ import annotations

import pytest
import torch

from pallava.default_collate_fn import default_collate_fn
from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.pallava import goldens


def golden_instances() -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
    io = goldens.read_tensors("collate/io.safetensors")
    instances = goldens.read_json("collate/instances.json")
    for index, instance in enumerate(instances):
        instance["pixel_values"] = io[f"pixel_values.{index}"]
    return instances, io


@pytest.mark.parametrize("mask", ["exact", "published"])
def test_batches_are_the_published_ones(mask: str) -> None:
    instances, io = golden_instances()
    batch = default_collate_fn(instances, mask=mask)
    assert batch["data_samples"] is None
    data = batch["data"]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(data[name], io[f"ref.{name}"]), name
        assert data[name].dtype == torch.int64
    expected = io["correct_attention_mask" if mask == "exact" else "ref.attention_mask"]
    assert torch.equal(data["attention_mask"], expected)
    for index, image in enumerate(data["pixel_values"]):
        assert torch.equal(image, io[f"pixel_values.{index}"])


def test_the_two_masks_differ() -> None:
    instances, io = golden_instances()
    assert io["ref.attention_mask"].all()
    assert default_collate_fn(instances)["data"]["attention_mask"].sum(dim=1).tolist() == [6, 3, 5]


def test_hugging_face_format_is_the_data_alone() -> None:
    instances, _ = golden_instances()
    bare = default_collate_fn(instances, return_hf_format=True)
    assert bare.keys() == default_collate_fn(instances)["data"].keys()


def test_images_are_listed_in_reading_order() -> None:
    stacks = [torch.full((1 + n, 3, 4, 4), float(n)) for n in range(4)]
    instances = [
        {"input_ids": [1, IMAGE_TOKEN_INDEX], "labels": [1, 1], "pixel_values": stacks[0]},
        {"input_ids": [1], "labels": [1]},
        {"input_ids": [IMAGE_TOKEN_INDEX] * 2, "labels": [1, 1], "pixel_values": stacks[1:3]},
        {"input_ids": [1], "labels": [1], "pixel_values": []},
        {"input_ids": [IMAGE_TOKEN_INDEX], "labels": [1], "pixel_values": [stacks[3]]},
    ]
    images = default_collate_fn(instances)["data"]["pixel_values"]
    assert [len(image) for image in images] == [1, 2, 3, 4]


def test_a_batch_of_texts_has_no_images() -> None:
    data = default_collate_fn(
        [
            {"input_ids": [1, 2], "labels": [1, 2], "pixel_values": []},
            {"input_ids": [3], "labels": [3]},
        ]
    )["data"]
    assert "pixel_values" not in data
    assert data["labels"].tolist() == [[1, 2], [3, IGNORE_INDEX]]


def test_padding_has_the_id_asked_for() -> None:
    instances = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    assert default_collate_fn(instances, pad_index=9)["data"]["input_ids"].tolist() == [
        [1, 2],
        [3, 9],
    ]


def test_packing_of_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="use_varlen_attn=False"):
        default_collate_fn([], use_varlen_attn=True)
