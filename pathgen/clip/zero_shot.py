"""Evaluates a CLIP by zero-shot classification, with confidence intervals.

The feature of a class is the L2-normalised mean of the features of its prompts: prompt ensembling
in embedding space (Radford et al. 2021, section 3.1.4, https://arxiv.org/abs/2103.00020). How much
a score depends on the wording is measured by each template, and each wording of the classes, alone.
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
from pathcore.files import StrPath
from pathcore.image_features import image_features
from pathcore.image_sets import ImageSet, read_images
from pathcore.rows import write_csv
from pathgen.clip.reports import SCORE_HEAD, head, score_row, write_report


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
    prompts = prompt_features(encoder, benchmark)
    similarities = features.features @ class_features(prompts).numpy().T
    predicted = similarities.argmax(axis=1)
    true = np.array(found.labels)[features.kept]
    scores = classification_scores(true, predicted, len(names), seed=seed)
    spread = {
        kind: score_spread(
            true,
            {n: (features.features @ v.numpy().T).argmax(axis=1) for n, v in variants.items()},
            len(names),
            seed=seed,
        )
        for kind, variants in prompt_variants(prompts, benchmark).items()
    }
    skipped = [*found.skipped, *features.skipped]
    metrics = {
        "task": "zero-shot classification",
        "benchmark": benchmark.name,
        "model": encoder.name,
        "classes": names,
        "num_prompts": [len(benchmark.sentences(i)) for i in range(len(names))],
        "num_cut": num_cut_prompts(encoder, benchmark),
        "num_skipped": len(skipped),
        **scores,
        "prompt_spread": spread,
    }
    rows = [
        [found.images[k].id, names[t], names[p], *map("{:.5f}".format, s)]
        for k, t, p, s in zip(features.kept, true, predicted, similarities, strict=True)
    ]
    write_csv(out / "predictions.csv", ["id", "true", "predicted", *names], rows)
    write_report(out, metrics, _classification_tables(metrics), skipped)
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


def prompt_features(encoder: Encoder, benchmark: ImageSet) -> list[torch.Tensor]:
    """Returns the L2-normalised features of each class's sentences.

    Returns:
        Per class a tensor `(num_templates, num_prompts, dim)`.
    """
    return [
        encoder.encode_texts(benchmark.sentences(index)).unflatten(
            0, (len(benchmark.templates), -1)
        )
        for index in range(len(benchmark.classes))
    ]


def num_cut_prompts(encoder: Encoder, benchmark: ImageSet) -> int | None:
    """Counts the sentences that the text tower cuts, see `Encoder.num_cut`."""
    return encoder.num_cut(
        [text for k in range(len(benchmark.classes)) for text in benchmark.sentences(k)]
    )


def class_features(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns one L2-normalised feature per class, `(num_classes, dim)`.

    Args:
        prompts: Features of each class's sentences, see `prompt_features`.
    """
    means = [features.flatten(0, -2).mean(dim=0) for features in prompts]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def prompt_variants(
    prompts: Sequence[torch.Tensor], benchmark: ImageSet
) -> dict[str, dict[str, torch.Tensor]]:
    """Returns class features of parts of the prompts.

    Args:
        prompts: Features of each class's sentences, see `prompt_features`.
        benchmark: The classes and templates.

    Returns:
        `templates`: by template, the class features `(num_classes, dim)` of that template alone.
        `wordings`: those of one wording of each class in all templates; variant j takes the j-th
        wording, and starts over for classes that have fewer. A kind with a single variant is left
        out.
    """
    templates = {
        template: class_features([features[number] for features in prompts])
        for number, template in enumerate(benchmark.templates)
    }
    wordings = {}
    for number in range(max(features.shape[1] for features in prompts)):
        chosen = [number % features.shape[1] for features in prompts]
        name = ", ".join(c.prompts[j] for c, j in zip(benchmark.classes, chosen, strict=True))
        own = [features[:, j] for features, j in zip(prompts, chosen, strict=True)]
        wordings[name] = class_features(own)
    found = {"templates": templates, "wordings": wordings}
    return {kind: variants for kind, variants in found.items() if len(variants) > 1}


def score_spread(
    true: NDArray[Any], predicted: Mapping[str, NDArray[Any]], num_classes: int, *, seed: int = 0
) -> dict[str, Any]:
    """Compares the balanced accuracies of several predictions for the same images.

    Args:
        true: int `(N,)`, classes counted from 0.
        predicted: int `(N,)` by name of the variant.
        num_classes: Number of classes.
        seed: Seed of the bootstrap.

    Returns:
        `mean` over the variants, `range` from the worst to the best, and `best` and `worst` with
        their names, each with a 95 % interval over images, which all variants share. The best one
        is chosen on the images that it is scored on, so that its score is optimistic. `each` has
        the value of every variant.
    """
    names = list(predicted)
    columns = np.stack([true, *predicted.values()], axis=1)
    patterns, counts = np.unique(columns, axis=0, return_counts=True)

    def scores(draws: NDArray[Any]) -> NDArray[Any]:
        """Returns balanced accuracies `(num_draws, num_variants)`."""
        matrices = (
            stats.confusions(patterns[:, 0], patterns[:, 1 + k], num_classes, draws)
            for k in range(len(names))
        )
        return np.stack([stats.balanced_accuracy(m) for m in matrices], axis=-1)

    values = scores(counts[None])[0]
    best, worst = int(values.argmax()), int(values.argmin())

    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(true), counts / len(true), size=stats.NUM_RESAMPLES)
    drawn = scores(draws)

    def entry(value: float, own: NDArray[Any]) -> dict[str, Any]:
        low, high = stats.percentile_interval(own)
        return {"value": float(value), "low": low, "high": high}

    return {
        "mean": entry(values.mean(), drawn.mean(axis=1)),
        "range": entry(np.ptp(values), np.ptp(drawn, axis=1)),
        "best": {"name": names[best], **entry(values[best], drawn[:, best])},
        "worst": {"name": names[worst], **entry(values[worst], drawn[:, worst])},
        "each": dict(zip(names, values.tolist(), strict=True)),
    }


def _classification_tables(metrics: Mapping[str, Any]) -> str:
    names, matrix = metrics["classes"], metrics["confusion_matrix"]
    lines = head(metrics, f"{metrics['num_images']} images, {len(names)} classes")
    scores = [*SCORE_HEAD]
    scores += [score_row(n, metrics[n]) for n in ("balanced_accuracy", "weighted_f1", "accuracy")]
    table = [
        f"| true \\ predicted | {' | '.join(names)} | recall |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, row, recall in zip(names, matrix, metrics["recall_per_class"], strict=True):
        shown = "-" if recall is None else f"{recall:.3f}"
        table.append(f"| {name} | {' | '.join(map(str, row))} | {shown} |")
    if metrics["prompt_spread"]:
        table += ["", *_spread_table(metrics)]
    return "\n".join([*lines, *scores, "", *table, ""])


def _spread_table(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        "| balanced accuracy by prompts | value | 95 % interval |",
        "|---|---|---|",
        score_row("all together", metrics["balanced_accuracy"]),
    ]
    singular = {"templates": "one template", "wordings": "one wording per class"}
    for kind, spread in metrics["prompt_spread"].items():
        rows.append(score_row(f"{singular[kind]}, mean of {len(spread['each'])}", spread["mean"]))
        for name in ("best", "worst"):
            wording = spread[name]["name"].replace("|", "\\|")
            rows.append(score_row(f"{singular[kind]}, {name}: {wording}", spread[name]))
        rows.append(score_row(f"{singular[kind]}, best minus worst", spread["range"]))
    return rows
