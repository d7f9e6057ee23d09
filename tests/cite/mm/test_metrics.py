from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import METRICS

import cite.mm  # noqa: F401
from cite.mm import metrics as module

GOLDEN = Path(__file__).parents[2] / "golden" / "cite"
PUBLISHED = json.loads((GOLDEN / "metrics.json").read_text())


def samples(host: str) -> list[dict[str, Any]]:
    """The published case, as the hosts hand it to a metric."""
    lines = [line.split() for line in (GOLDEN / "metrics_ann.txt").read_text().splitlines()]
    scores = np.loadtxt(GOLDEN / "metrics_scores.csv", delimiter=",", dtype=np.float32)
    rows = []
    for index, ((name, label), score) in enumerate(zip(lines, scores, strict=True)):
        meta = {"sample_idx": index, "img_path": f"data/patches_captions/{name}"}
        target, score = torch.tensor([int(label)]), torch.from_numpy(score)
        if host == "mmcls":
            rows.append(meta | {"gt_label": {"label": target}, "pred_label": {"score": score}})
        else:
            predicted = {"pred_label": score.argmax()[None], "pred_score": score}
            rows.append(meta | {"gt_label": target} | predicted)
    return rows


@pytest.mark.parametrize("host", ["mmcls", "mmpretrain"])
def test_published_metrics(host: str) -> None:
    metric = METRICS.build({"type": "SlideMetric"})
    rows = samples(host)
    for start in range(0, len(rows), 7):
        metric.process(None, rows[start : start + 7])
    assert metric.evaluate(len(rows)) == PUBLISHED["config_metrics"]


@pytest.mark.parametrize("repeated", [0, 2])
def test_ranks_are_joined_and_repeated_samples_count_once(
    repeated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks; the sampler repeats the first patches to give all ranks as many."""
    rows = samples("mmcls")
    shares = [rows[rank::3] for rank in range(3)]
    for rank in range(1, 1 + repeated):
        shares[rank] = [*shares[rank], rows[rank - 1]]
    parts = []
    for share in shares:
        metric = METRICS.build({"type": "SlideMetric"})
        metric.process(None, share)
        parts.append(list(metric.results))
    monkeypatch.setattr(module, "all_gather_object", lambda results: parts)
    assert metric.evaluate(len(rows)) == PUBLISHED["config_metrics"]


def test_patches_without_slides() -> None:
    rows = [row | {"img_path": f"{row['sample_idx']}.jpg"} for row in samples("mmpretrain")]
    metric = METRICS.build({"type": "SlideMetric", "items": ["accuracy"], "prefix": "patch"})
    metric.process(None, rows)
    assert metric.evaluate(len(rows)) == {"patch/accuracy": 55.0}
    metric = METRICS.build({"type": "SlideMetric"})
    with pytest.raises(ValueError, match="holds no slide id"):
        metric.process(None, rows)


def test_nothing_predicted() -> None:
    metric = METRICS.build({"type": "SlideMetric"})
    with pytest.raises(ValueError, match="the dataset to evaluate is empty"):
        metric.evaluate(0)
    with pytest.raises(ValueError, match="neither sample_idx nor img_path"):
        metric.process(None, [{"pred_score": torch.ones(3), "gt_label": torch.tensor([0])}])
