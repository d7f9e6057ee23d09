"""Evaluator for scores of patches and slides."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS
from mmengine.visualization import Visualizer

from cite.bag_metrics import (
    PATCH_METRICS,
    PUBLISHED_METRICS,
    SLIDE_METRICS,
    Predictions,
    Voting,
    compute_metrics,
    confusion_figure,
    confusion_matrix,
    vote,
)
from cite.splits import slide_id
from pathcore.calibration import reliability_figure


@METRICS.register_module()
class SlideMetric(BaseMetric):
    """Computes accuracy, mean accuracy, AUROC, Cohen's kappa and calibration of patches and slides.

    Each patch counts once, even if the sampler repeats some so that all ranks get equally many.

    Args:
        items: Names from `cite.bag_metrics.PATCH_METRICS` and `SLIDE_METRICS`, or `all`; by default
            those of the published code. Not called `metrics`, because MMEngine interprets that
            argument of an evaluator.
        voting: `soft` for the mean of the scores, as published, or `hard`.
        num_resamples: Number of bootstrap resamples of slides for 95 % intervals, `<name>_low` and
            `<name>_high`; 0 computes none.
        seed: Seed of the bootstrap.
        picture: Whether to pass confusion matrices and reliability diagrams of patches and slides
            to the visualizer, which writes them to `vis_data/vis_image` in the work folder.
        collect_device: See `BaseMetric`.
        prefix: Prefix of the names of scores.
    """

    default_prefix = ""

    def __init__(
        self,
        items: Sequence[str] | str = PUBLISHED_METRICS,
        voting: Voting = "soft",
        num_resamples: int = 0,
        seed: int = 0,
        picture: bool = False,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.items = (*PATCH_METRICS, *SLIDE_METRICS) if items == "all" else tuple(items)
        self.voting = voting
        self.num_resamples = num_resamples
        self.seed = seed
        self.picture = picture

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Stores the predictions of a batch, from MMClassification or MMPreTrain."""
        for sample in data_samples:
            if "pred_score" in sample:
                score, label = sample["pred_score"], sample["gt_label"]
            else:
                score, label = sample["pred_label"]["score"], sample["gt_label"]["label"]
            key = _key(sample)
            slide = sample["slide"] if "slide" in sample else self._slide_of(sample, key)
            self.results.append((key, str(slide), score.float().cpu(), int(label)))

    def evaluate(self, size: int) -> dict[str, float]:
        """Gathers predictions from all ranks and computes scores, with each patch once."""
        # By key, since samplers repeat patches so that all ranks get the same number.
        found = {row[0]: row[1:] for part in all_gather_object(self.results) for row in part}
        self.results.clear()
        metrics: list[dict[str, float] | None] = [None]
        if is_main_process():
            if len(found) != size:
                print_log(
                    f"SlideMetric: predictions of {len(found)} patches; the dataset has {size}",
                    logger="current",
                    level=logging.WARNING,
                )
            rows = [found[key] for key in sorted(found)]
            scores = self.compute_metrics(rows)
            metrics = [{f"{self.prefix}/{k}" if self.prefix else k: v for k, v in scores.items()}]
        broadcast_object_list(metrics)
        assert metrics[0] is not None
        return metrics[0]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Computes scores from `(slide, scores, label)` of each patch.

        Raises:
            ValueError: If there are no patches, or scores over slides are requested and a patch has
                no slide.
        """
        if not results:
            raise ValueError("SlideMetric: no predictions; the dataset to evaluate is empty")
        slides, scores, labels = zip(*results, strict=True)
        patches = Predictions(
            torch.stack(scores).numpy(), np.array(labels), np.array(slides, dtype=str)
        )
        if self.picture:
            self._draw(patches)
        return compute_metrics(
            patches,
            self.items,
            voting=self.voting,
            num_resamples=self.num_resamples,
            seed=self.seed,
        )

    def _slide_of(self, sample: dict[str, Any], key: Any) -> Any:
        if set(self.items) & set(SLIDE_METRICS):
            return slide_id(os.path.basename(str(sample.get("img_path", key))))
        return key

    def _draw(self, patches: Predictions) -> None:
        classes = (self.dataset_meta or {}).get("classes") or range(patches.num_classes)
        visualizer = Visualizer.get_current_instance()
        for name, cases in (("patches", patches), ("slides", vote(patches, self.voting))):
            figure = confusion_figure(confusion_matrix(cases), [str(c) for c in classes], name)
            visualizer.add_image(f"confusion_matrix_{name}", _pixels(figure))
            if cases.are_probabilities:
                figure = reliability_figure(cases.labels, cases.scores, name)
                visualizer.add_image(f"reliability_{name}", _pixels(figure))


def _key(sample: dict[str, Any]) -> Any:
    key = sample.get("sample_idx", sample.get("img_path"))
    if key is None:
        raise ValueError(
            "SlideMetric: a sample has neither sample_idx nor img_path; pack them, with "
            "dict(type='PackPatch') or meta_keys of the host's own transform"
        )
    return key


def _pixels(figure: Any) -> np.ndarray[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
