"""Common access to samples of MMClassification (`ClsDataSample`) and MMPreTrain (`DataSample`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cite.mm.transforms import default_host


def new_sample(host: str | None = None) -> Any:
    """Returns an empty sample of `mmcls` or `mmpretrain`; by default of the config's scope."""
    if (host or default_host()) == "mmpretrain":
        from mmpretrain.structures import DataSample

        return DataSample()
    from mmcls.structures import ClsDataSample

    return ClsDataSample()


def labels_of(samples: Sequence[Any]) -> Tensor:
    """Returns labels `(batch,)`, or soft labels `(batch, num_classes)` of mixed images."""
    rows = []
    for sample in samples:
        soft = sample.get("gt_score") if "gt_score" in sample else None
        label = sample.gt_label
        if soft is None and not isinstance(label, Tensor):
            soft = label.score if "score" in label else None
            label = label.label if soft is None else label
        rows.append(soft[None] if soft is not None else label)
    return torch.cat(rows)


def with_predictions(scores: Tensor, samples: Sequence[Any] | None) -> list[Any]:
    """Stores probabilities and predicted classes in samples, which are created if not given."""
    probabilities = scores.softmax(dim=1)
    labels = probabilities.argmax(dim=1, keepdim=True).detach()
    given = samples if samples is not None else [None] * len(scores)
    predicted = []
    for sample, probability, label in zip(given, probabilities, labels, strict=True):
        sample = new_sample() if sample is None else sample
        predicted.append(sample.set_pred_score(probability).set_pred_label(label))
    return predicted
