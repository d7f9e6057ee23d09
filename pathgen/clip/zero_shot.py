"""Evaluates a CLIP: zero-shot classification and image-text retrieval, with confidence intervals.

The feature of a class is the L2-normalised mean of the features of its prompts: prompt ensembling
in embedding space (Radford et al. 2021, section 3.1.4, https://arxiv.org/abs/2103.00020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathcore import stats
from pathcore.encoders import Encoder
from pathcore.files import StrPath, write_json, write_text
from pathcore.image_features import image_features
from pathcore.image_sets import FileImage, ImageSet, read_images
from pathcore.images import path_inside
from pathcore.rows import BadRow, pair_fault, read_rows_with_id, write_csv, write_rows

METRICS_NAME = "metrics.json"
TABLES_NAME = "metrics.md"
SKIPPED_NAME = "skipped.jsonl"

_QUERIES_AT_A_TIME = 1024


def zero_shot(
    encoder: Encoder,
    benchmark: ImageSet,
    data_path: StrPath,
    out: StrPath,
    *,
    cache_dir: StrPath | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Classifies all images of a benchmark and writes predictions and scores.

    Args:
        encoder: The CLIP.
        benchmark: Classes, prompts and layout of the data set.
        data_path: Folder of the data set as published.
        out: Folder for `metrics.json`, `metrics.md`, `predictions.csv`, `skipped.jsonl`.
        cache_dir: Folder in which features are cached; by default `features/` in `out`.
        batch_size: Number of images per batch.
        num_workers: Number of processes that read images.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.

    Returns:
        The content of `metrics.json`.

    Raises:
        FileNotFoundError: If the data are missing, or a class has no images.
        ValueError: If the data do not follow the layout.
    """
    found, out, names = read_images(benchmark, data_path), Path(out), benchmark.names
    out.mkdir(parents=True, exist_ok=True)
    features = image_features(
        encoder,
        found.images,
        Path(cache_dir) if cache_dir else out / "features",
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    classifier = class_features(encoder, benchmark)
    similarities = features.features @ classifier.numpy().T
    predicted = similarities.argmax(axis=1)
    true = np.array(found.labels)[features.kept]
    scores = classification_scores(true, predicted, len(names), seed=seed)
    skipped = [*found.skipped, *features.skipped]
    metrics = {
        "task": "zero-shot classification",
        "benchmark": benchmark.name,
        "model": encoder.name,
        "classes": names,
        "num_prompts": [len(benchmark.sentences(i)) for i in range(len(names))],
        "num_skipped": len(skipped),
        **scores,
    }
    rows = [
        [found.images[k].id, names[t], names[p], *map("{:.5f}".format, s)]
        for k, t, p, s in zip(features.kept, true, predicted, similarities, strict=True)
    ]
    write_csv(out / "predictions.csv", ["id", "true", "predicted", *names], rows)
    _write_report(out, metrics, _classification_tables(metrics), skipped)
    return metrics


def classification_scores(
    true: NDArray[Any], predicted: NDArray[Any], num_classes: int, *, seed: int = 0
) -> dict[str, Any]:
    """Returns accuracy, balanced accuracy, weighted F1 and confusion matrix, with intervals.

    Classes that never occur are excluded from means, as in scikit-learn.

    Args:
        true: int `(N,)`, classes counted from 0.
        predicted: int `(N,)`.
        num_classes: Number of classes, including those that never occur.
        seed: Seed of the bootstrap.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    labels = np.arange(num_classes)
    matrix = confusion_matrix(true, predicted, labels=labels)
    values: Mapping[str, tuple[float, Callable[[NDArray[Any]], NDArray[Any]]]] = {
        "accuracy": (accuracy_score(true, predicted), stats.accuracy),
        "balanced_accuracy": (
            float(stats.balanced_accuracy(matrix)),  # equals scikit-learn's, without its warning
            stats.balanced_accuracy,
        ),
        "weighted_f1": (
            f1_score(true, predicted, labels=labels, average="weighted", zero_division=0),
            stats.weighted_f1,
        ),
    }
    scores: dict[str, Any] = {}
    for name, (value, statistic) in values.items():
        low, high = stats.count_interval(matrix, statistic, seed=seed)
        scores[name] = {"value": float(value), "low": low, "high": high}
    recalls = matrix.diagonal() / np.maximum(matrix.sum(axis=1), 1)
    return {
        **scores,
        "recall_per_class": [
            float(recall) if support else None
            for recall, support in zip(recalls, matrix.sum(axis=1), strict=True)
        ],
        "confusion_matrix": matrix.tolist(),
        "num_images": len(true),
    }


def class_features(encoder: Encoder, benchmark: ImageSet) -> torch.Tensor:
    """Returns one L2-normalised feature per class, `(num_classes, dim)`."""
    means = [
        encoder.encode_texts(benchmark.sentences(index)).mean(dim=0)
        for index in range(len(benchmark.classes))
    ]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def retrieval(
    encoder: Encoder,
    pairs: StrPath,
    out: StrPath,
    *,
    image_folder: StrPath | None = None,
    ks: Sequence[int] = (1, 5, 10),
    cache_dir: StrPath | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Finds captions for images and images for captions, and writes recall at k.

    Equal captions count as one caption, for which several images are right.

    Args:
        encoder: The CLIP.
        pairs: `pairs.jsonl`.
        out: Folder for `metrics.json`, `metrics.md`, `skipped.jsonl`.
        image_folder: Folder of the images; by default the folder of `pairs`.
        ks: Ranks k at which recall is computed.
        cache_dir: Folder in which features are cached; by default `features/` in `out`.
        batch_size: Number of images per batch.
        num_workers: Number of processes that read images.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If `pairs` does not exist.
        ValueError: If no pair can be used.
    """
    pairs, out = Path(pairs), Path(out)
    folder = Path(image_folder) if image_folder else pairs.parent
    images, captions, skipped = _read_pairs(pairs, folder)
    out.mkdir(parents=True, exist_ok=True)
    found = image_features(
        encoder,
        images,
        Path(cache_dir) if cache_dir else out / "features",
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    kept = [captions[index] for index in found.kept]
    texts = list(dict.fromkeys(kept))
    number = {text: index for index, text in enumerate(texts)}
    right = np.array([number[text] for text in kept])
    text_features = encoder.encode_texts(texts).numpy()
    ranks = {
        "image_to_text": _ranks(found.features, text_features, [[caption] for caption in right]),
        "text_to_image": _ranks(text_features, found.features, _groups(right, len(texts))),
    }
    skipped += found.skipped
    metrics: dict[str, Any] = {
        "task": "image-text retrieval",
        "benchmark": pairs.stem,
        "model": encoder.name,
        "num_images": len(kept),
        "num_captions": len(texts),
        "num_skipped": len(skipped),
        **{name: _recalls(values, ks, seed) for name, values in ranks.items()},
    }
    _write_report(out, metrics, _retrieval_tables(metrics, ks), skipped)
    return metrics


def _read_pairs(
    pairs: Path, folder: Path
) -> tuple[list[FileImage], list[str], list[dict[str, str]]]:
    images, captions, skipped = [], [], []
    for number, row in read_rows_with_id(pairs):
        reason = row if isinstance(row, BadRow) else pair_fault(row)
        if isinstance(row, dict) and not reason:
            try:
                images.append(FileImage(row["id"], path_inside(folder, row["image"])))
                captions.append(row["caption"])
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            found = row["id"] if isinstance(row, dict) else f"line {number}"
            skipped.append({"id": found, "reason": reason})
    if not images:
        raise ValueError(f"{pairs}: no pair that can be used; the first: {skipped[:1]}")
    return images, captions, skipped


def _groups(right: NDArray[np.int64], num_texts: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(num_texts)]
    for image, caption in enumerate(right):
        groups[caption].append(image)
    return groups


def _ranks(
    queries: NDArray[np.float32], candidates: NDArray[np.float32], right: Sequence[Sequence[int]]
) -> NDArray[np.int64]:
    """Counts, per query, the wrong candidates that are at least as near as the nearest right one.

    Ties count against the model: one that maps everything to the same feature finds nothing.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _QUERIES_AT_A_TIME):
        similarities = queries[start : start + _QUERIES_AT_A_TIME] @ candidates.T
        for row, values in enumerate(similarities):
            own = list(right[start + row])
            best = values[own].max()
            ranks[start + row] = (values >= best).sum() - (values[own] >= best).sum()
    return ranks


def _recalls(ranks: NDArray[np.int64], ks: Sequence[int], seed: int) -> dict[str, Any]:
    recalls: dict[str, Any] = {"median_rank": float(np.median(ranks)) + 1}
    for k in ks:
        hits = int((ranks < k).sum())
        counts = np.array([hits, len(ranks) - hits])
        low, high = stats.count_interval(
            counts, lambda draws: draws[:, 0] / draws.sum(1), seed=seed
        )
        recalls[f"recall@{k}"] = {"value": hits / len(ranks), "low": low, "high": high}
    return recalls


def _classification_tables(metrics: Mapping[str, Any]) -> str:
    names, matrix = metrics["classes"], metrics["confusion_matrix"]
    head = _head(metrics, f"{metrics['num_images']} images, {len(names)} classes")
    scores = ["| score | value | 95 % interval |", "|---|---|---|"]
    scores += [_score_row(n, metrics[n]) for n in ("balanced_accuracy", "weighted_f1", "accuracy")]
    table = [
        f"| true \\ predicted | {' | '.join(names)} | recall |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, row, recall in zip(names, matrix, metrics["recall_per_class"], strict=True):
        shown = "-" if recall is None else f"{recall:.3f}"
        table.append(f"| {name} | {' | '.join(map(str, row))} | {shown} |")
    return "\n".join([*head, *scores, "", *table, ""])


def _retrieval_tables(metrics: Mapping[str, Any], ks: Sequence[int]) -> str:
    head = _head(metrics, f"{metrics['num_images']} images, {metrics['num_captions']} captions")
    table = ["| score | value | 95 % interval |", "|---|---|---|"]
    for name in ("image_to_text", "text_to_image"):
        label = name.replace("_", " ")
        table += [_score_row(f"{label}, recall@{k}", metrics[name][f"recall@{k}"]) for k in ks]
        table.append(f"| {label}, median rank | {metrics[name]['median_rank']:g} | |")
    return "\n".join([*head, *table, ""])


def _head(metrics: Mapping[str, Any], what: str) -> list[str]:
    skipped = metrics["num_skipped"]
    lines = [
        f"# {metrics['benchmark']}: {metrics['task']}",
        "",
        f"Model: `{metrics['model']}`; {what}.",
    ]
    if skipped:
        lines.append(f"{skipped} skipped: see {SKIPPED_NAME}.")
    return [*lines, ""]


def _score_row(name: str, score: Mapping[str, float]) -> str:
    label = name.replace("_", " ")
    return f"| {label} | {score['value']:.4f} | {score['low']:.4f} to {score['high']:.4f} |"


def _write_report(
    out: Path, metrics: Mapping[str, Any], tables: str, skipped: Sequence[Mapping[str, Any]]
) -> None:
    write_rows(out / SKIPPED_NAME, skipped)
    write_text(out / TABLES_NAME, tables)
    write_json(out / METRICS_NAME, metrics)
