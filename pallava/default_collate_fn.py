"""Collates samples to a batch. Published configs import this module, so the path is public."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pallava.text.encoding import IGNORE_INDEX

PAD_INDEX = 0
"""XTuner's `DEFAULT_PAD_TOKEN_INDEX`; padding is masked, so the value has no effect."""


def default_collate_fn(
    instances: Sequence[dict[str, Any]],
    pad_index: int = PAD_INDEX,
    return_hf_format: bool = False,
    use_varlen_attn: bool = False,
    mask: Literal["exact", "published"] = "exact",
) -> dict[str, Any]:
    """Pads the texts of a batch on the right and collects its images in a list.

    Args:
        instances: Samples with `input_ids`, `labels` and, for samples with images, `pixel_values`:
            one stack `(1 + num_sub_images, 3, S, S)` or a list of stacks. Some may have
            `label_marks`.
        pad_index: Token id used for padding.
        return_hf_format: Whether to return the bare dictionary instead of MMEngine's
            `data`/`data_samples`.
        use_varlen_attn: Must be False; packing is not supported for conversations about images.
        mask: `exact` masks the padding. `published` reproduces the original code, which indexes
            rows instead of columns and so masks nothing. With padding on the right this is
            harmless: no token with a label attends to it.

    Returns:
        `input_ids`, `labels`, `position_ids` and `attention_mask`, each `(B, longest)`;
        `label_marks` of the same shape if a sample has them; and `pixel_values`, a list of all
        images in reading order, which is absent if there are none.

    Raises:
        ValueError: If `use_varlen_attn` is True.

    Example:
        >>> samples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        ...            {"input_ids": [1, 2], "labels": [-100, 2]}]
        >>> default_collate_fn(samples)["data"]["attention_mask"].int().tolist()
        [[1, 1, 1], [1, 1, 0]]
    """
    if use_varlen_attn:
        raise ValueError(
            "use_varlen_attn packs texts without images; PA-LLaVA needs use_varlen_attn=False"
        )
    ids = [torch.as_tensor(instance["input_ids"], dtype=torch.long) for instance in instances]
    labels = [torch.as_tensor(instance["labels"], dtype=torch.long) for instance in instances]
    lengths = torch.tensor([len(sequence) for sequence in ids])
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_index)
    steps = torch.arange(input_ids.shape[1])
    if mask == "published":
        rows = torch.arange(len(ids)) < lengths.max()
        attention_mask = rows[:, None].expand_as(input_ids).clone()
    else:
        attention_mask = steps < lengths[:, None]
    data: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": steps.expand(len(ids), -1).clone(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    if any("label_marks" in instance for instance in instances):
        marks = [
            torch.as_tensor(instance.get("label_marks", [0] * len(sequence)))
            for instance, sequence in zip(instances, ids, strict=True)
        ]
        data["label_marks"] = pad_sequence(marks, batch_first=True)
    images = [image for instance in instances for image in _images(instance)]
    if images:
        data["pixel_values"] = images
    return data if return_hf_format else {"data": data, "data_samples": None}


def _images(instance: dict[str, Any]) -> list[Tensor]:
    value = instance.get("pixel_values")
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)
