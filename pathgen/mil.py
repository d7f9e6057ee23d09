"""Slide classification by attention MIL over stored features: training, scores, attention maps.

For each fold and seed a folder `fold_K_seed_S/` with the weights of the best epoch on the
validation slides, the test slides' predictions and scores; over all of them a table. A killed run
continues at its last whole epoch and gives what an unbroken one gives.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from pathcore.files import atomic_file, folder_lock, write_json, write_text
from pathgen.attention_maps import draw_attention
from pathgen.intervals import (
    accuracy,
    auroc_interval,
    balanced_accuracy,
    count_interval,
    macro_f1,
)
from pathgen.mil_data import FeatureFolder, SlideLabels, Split, find_splits, read_labels, read_split
from pathgen.mil_models import MODELS

SCORES = ("auroc", "f1", "balanced_accuracy", "accuracy")
"""AUROC of two classes, or the mean of one against the rest; F1 as the mean over classes."""

_OF_COUNTS = {"f1": macro_f1, "balanced_accuracy": balanced_accuracy, "accuracy": accuracy}


@dataclass(frozen=True)
class MILSettings:
    """How a model is trained.

    Attributes:
        model: One of `pathgen.mil_models.MODELS`.
        embed_dim: Width after projection.
        hidden_dim: Of the attention.
        epochs: Passes over the training slides.
        lr: Of AdamW, falling to 0 on a cosine.
        weight_decay: Of AdamW.
        bag_size: At most so many patches of a slide in a training step, drawn anew; 0 takes all.
    """

    model: str = "abmil"
    embed_dim: int = 512
    hidden_dim: int = 256
    epochs: int = 50
    lr: float = 2e-4
    weight_decay: float = 1e-5
    bag_size: int = 0

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model {self.model!r}: one of {sorted(MODELS)} expected")
        if self.epochs < 1 or self.lr <= 0 or self.bag_size < 0:
            raise ValueError(f"epochs {self.epochs}, lr {self.lr}, bag size {self.bag_size}")


def train_mil(
    features: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    splits: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: MILSettings | None = None,
    label: str = "label",
    folds: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    heat_maps: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains and tests a model for each fold and seed.

    Args:
        features: Folder with `SLIDE.h5` per slide.
        labels: Table with `slide_id`, a label, and `case_id` where patients are known.
        splits: Folder with `splits_0.csv` and so on.
        out: Output folder.
        settings: Of model and training.
        label: Column of the labels.
        folds: Numbers of folds; by default all.
        seeds: Of weights and order.
        heat_maps: Draw the attention over each test slide.
        device: `cuda` or `cpu`; by default a GPU where there is one.
        progress: Show progress bars.

    Returns:
        What `metrics.json` holds.

    Raises:
        FileNotFoundError: Tables, splits or folds that are not there.
        ValueError: Tables that contradict themselves, or a folder of another run.
    """
    settings, out = settings or MILSettings(), Path(out)
    known, found = read_labels(labels, label=label), find_splits(splits)
    if missing := [fold for fold in folds if fold not in found]:
        raise FileNotFoundError(f"{splits}: no folds {missing}, only {list(found)}")
    read = {fold: read_split(found[fold], known) for fold in folds or found}
    bags = FeatureFolder(Path(features))
    slides = sorted({s for split in read.values() for s in split.train + split.val + split.test})
    in_dim, skipped = bags.check(slides)
    bad = {row["id"] for row in skipped}
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    with folder_lock(out / ".lock"):
        for fold, split in read.items():
            usable = split.without(bad)
            for seed in seeds:
                run = Run(out / f"fold_{fold}_seed_{seed}", settings, known, usable, bags, in_dim,
                          seed, chosen)  # fmt: skip
                runs.append({"fold": fold, "seed": seed, **run.finish(heat_maps, progress)})
        metrics = {
            "settings": asdict(settings),
            "features": str(features),
            "classes": list(known.classes),
            "num_skipped": len(skipped),
            "scores": {name: _spread([run[name]["value"] for run in runs]) for name in SCORES},
            "runs": runs,
        }
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped)
        write_text(out / "skipped.jsonl", lines)
        write_text(out / "metrics.md", _table(metrics))
        write_json(out / "metrics.json", metrics)
    return metrics


class Run:
    """One fold with one seed."""

    def __init__(
        self,
        folder: Path,
        settings: MILSettings,
        labels: SlideLabels,
        split: Split,
        bags: FeatureFolder,
        in_dim: int,
        seed: int,
        device: torch.device,
    ) -> None:
        for part in ("train", "val", "test"):
            if not getattr(split, part):
                raise ValueError(f"{folder.name}: no slide of {part} has features")
        self.folder, self.settings, self.labels, self.split = folder, settings, labels, split
        self.bags, self.seed, self.device = bags, seed, device
        torch.manual_seed(seed)
        self.config = {
            "in_dim": in_dim,
            "num_classes": len(labels.classes),
            "embed_dim": settings.embed_dim,
            "hidden_dim": settings.hidden_dim,
        }
        self.model: nn.Module = MODELS[settings.model](**self.config).to(device)

    def finish(self, heat_maps: bool, progress: bool) -> dict[str, Any]:
        """Trains what is left to train, tests, and returns the scores."""
        self.folder.mkdir(exist_ok=True)
        inputs = {
            "settings": asdict(self.settings),
            "config": self.config,
            "classes": list(self.labels.classes),
            "features": str(self.bags.path.absolute()),
            "slides": asdict(self.split),
            "seed": self.seed,
        }
        inputs = json.loads(json.dumps(inputs))
        file = self.folder / "config.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != inputs:
            raise ValueError(f"{self.folder}: holds a run of other settings; name a new folder")
        write_json(file, inputs)
        self._train(progress)
        return self._test(heat_maps)

    def _train(self, progress: bool) -> None:
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
        last, history = self.folder / "last.pt", []
        if last.is_file():
            state = torch.load(last, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            history = state["history"]
        epochs = range(len(history), settings.epochs)
        for epoch in tqdm(epochs, desc=self.folder.name, unit="epoch", disable=not progress):
            # Set anew for each epoch, so that a continued run draws what an unbroken one draws.
            torch.manual_seed(self.seed * 100_003 + epoch)
            loss = self._epoch(optimizer)
            schedule.step()
            true, probabilities = self._predict(self.split.val)
            entry = {"loss": loss, **_validation(true, probabilities)}
            if not history or _goodness(entry) > max(map(_goodness, history)):
                self._save_best()
            history.append(entry)
            with atomic_file(last) as partial:
                state = {
                    "model": self.model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "history": history,
                }
                torch.save(state, partial)
        write_json(self.folder / "history.json", history)

    def _epoch(self, optimizer: torch.optim.Optimizer) -> float:
        self.model.train()
        losses = []
        for index in torch.randperm(len(self.split.train)).tolist():
            slide = self.split.train[index]
            features, _ = self.bags.read(slide)
            if 0 < self.settings.bag_size < len(features):
                features = features[torch.randperm(len(features))[: self.settings.bag_size]]
            label = torch.tensor(self.labels.by_slide[slide], device=self.device)
            output = self.model(features.to(self.device))
            loss = self.model.loss(output, label)  # type: ignore[operator]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean = float(np.mean(losses))
        if not np.isfinite(mean):
            raise ValueError(f"{self.folder.name}: the loss is {mean}; lower the learning rate")
        return mean

    @torch.inference_mode()
    def _predict(self, slides: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """True classes `(S,)` and probabilities `(S, K)`."""
        self.model.eval()
        rows = []
        for slide in slides:
            features, _ = self.bags.read(slide)
            rows.append(self.model(features.to(self.device)).logits.softmax(-1).cpu().numpy())
        return np.array([self.labels.by_slide[slide] for slide in slides]), np.stack(rows)

    def _save_best(self) -> None:
        from safetensors.torch import save_file

        with atomic_file(self.folder / "model.safetensors") as partial:
            save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, partial)

    def _test(self, heat_maps: bool) -> dict[str, Any]:
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(self.folder / "model.safetensors"))
        true, probabilities = self._predict(self.split.test)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["slide_id", "true", "predicted", *self.labels.classes])
        for slide, label, row in zip(self.split.test, true, probabilities, strict=True):
            names = [self.labels.classes[label], self.labels.classes[row.argmax()]]
            writer.writerow([slide, *names, *map("{:.6f}".format, row)])
        write_text(self.folder / "predictions.csv", text.getvalue())
        scores = score_slides(true, probabilities, seed=self.seed)
        write_json(self.folder / "metrics.json", scores)
        if heat_maps:
            self._draw()
        return scores

    @torch.inference_mode()
    def _draw(self) -> None:
        folder = self.folder / "attention"
        folder.mkdir(exist_ok=True)
        self.model.eval()
        for slide in self.split.test:
            features, coords = self.bags.read(slide)
            attention = self.model(features.to(self.device)).attention.mean(dim=0).cpu().numpy()
            draw_attention(self.bags.file(slide), coords, attention, folder / f"{slide}.png")


def score_slides(
    true: NDArray[Any], probabilities: NDArray[Any], *, seed: int = 0
) -> dict[str, Any]:
    """Scores of slides with intervals over draws of slides.

    Args:
        true: int `(S,)`.
        probabilities: `(S, K)`.
        seed: Of the intervals.

    Returns:
        Name of `SCORES` -> `value`, `low`, `high`; None where a class has no slides for AUROC.
    """
    from sklearn.metrics import confusion_matrix

    labels = np.arange(probabilities.shape[1])
    matrix = confusion_matrix(true, probabilities.argmax(axis=1), labels=labels)
    scores: dict[str, Any] = {"num_slides": len(true)}
    for name in SCORES:
        if name == "auroc":
            value = _auroc(true, probabilities)
            low, high = auroc_interval(true, probabilities, seed=seed)
        else:
            value = float(_OF_COUNTS[name](matrix[None])[0])
            low, high = count_interval(matrix, _OF_COUNTS[name], seed=seed)
        whole = np.isfinite([value, low, high]).all()
        found = {"value": value, "low": low, "high": high}
        scores[name] = found if whole else dict.fromkeys(found)
    return scores


def _auroc(true: NDArray[Any], probabilities: NDArray[Any]) -> float:
    from sklearn.metrics import roc_auc_score

    num_classes = probabilities.shape[1]
    if len(np.unique(true)) < num_classes:
        return float("nan")
    if num_classes == 2:
        return float(roc_auc_score(true, probabilities[:, 1]))
    return float(roc_auc_score(true, probabilities, multi_class="ovr", average="macro"))


def _validation(true: NDArray[Any], probabilities: NDArray[Any]) -> dict[str, float]:
    own = probabilities[np.arange(len(true)), true]
    loss = float(-np.log(np.maximum(own, 1e-12)).mean())
    return {"val_loss": loss, "val_auroc": _auroc(true, probabilities)}


def _goodness(entry: Mapping[str, float]) -> tuple[float, float]:
    """By AUROC, where it is defined, then by loss."""
    auroc = entry["val_auroc"]
    return (0.0 if np.isnan(auroc) else auroc, -entry["val_loss"])


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "std": None, "num_runs": 0}
    std = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return {"mean": float(np.mean(found)), "std": std, "num_runs": len(found)}


def _table(metrics: Mapping[str, Any]) -> str:
    lines = [
        f"# {metrics['settings']['model'].upper()} on {metrics['features']}",
        "",
        f"Classes: {', '.join(metrics['classes'])}. In brackets 95 % intervals over slides.",
        "",
        f"| fold | seed | slides | {' | '.join(SCORES)} |",
        "|---" * (len(SCORES) + 3) + "|",
    ]
    for run in metrics["runs"]:
        cells = [_cell(run[name]) for name in SCORES]
        head = f"| {run['fold']} | {run['seed']} | {run['num_slides']} |"
        lines.append(f"{head} {' | '.join(cells)} |")
    means = [_mean_cell(metrics["scores"][name]) for name in SCORES]
    lines.append(f"| mean | | | {' | '.join(means)} |")
    if metrics["num_skipped"]:
        lines += ["", f"{metrics['num_skipped']} slides left out: see skipped.jsonl."]
    return "\n".join([*lines, ""])


def _cell(score: Mapping[str, float | None]) -> str:
    if score["value"] is None:
        return "-"
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def _mean_cell(spread: Mapping[str, Any]) -> str:
    if spread["mean"] is None:
        return "-"
    std = "" if spread["std"] is None else f" ± {spread['std']:.3f}"
    return f"{spread['mean']:.3f}{std}"
