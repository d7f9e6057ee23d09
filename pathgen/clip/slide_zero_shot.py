"""Classifies slides without training: patch scores against class prompts, pooled by top k.

MI-Zero (Lu et al. 2023, https://arxiv.org/abs/2306.07831): the score of a class for a slide is the
mean of the k highest similarities of the slide's patches to the class; the slide is of the class
with the highest score.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pathcore.encoders import Encoder
from pathcore.encoders.origin import TileOrigin
from pathcore.encoders.presets import known_encoder
from pathcore.files import StrPath
from pathcore.image_sets import ImageSet
from pathcore.label_tables import read_label_table
from pathcore.rows import write_csv
from pathgen.clip.reports import head, score_row, write_report
from pathgen.clip.zero_shot import (
    class_features,
    classification_scores,
    num_cut_prompts,
    prompt_features,
)
from pathgen.selection.features import slide_features
from wsi.heat_map import MapFormat, PatchScores, write_score_map
from wsi.slide_listing import SlideListing
from wsi.store import (
    read_attributes,
    read_coordinates,
    read_feature_attributes,
    read_features,
)

_UNIT_TOLERANCE = 1e-2
"""Tolerance for the length of unit vectors that were stored in half precision."""

KS = (1, 5, 10, 50, 100)
"""Numbers of patches of MI-Zero's experiments."""


def pool_top_k(similarities: NDArray[Any], k: int) -> NDArray[np.float64]:
    """Returns the mean of the k highest similarities of each class.

    Args:
        similarities: `(num_patches, num_classes)`.
        k: Number of patches; all if a slide has fewer.

    Returns:
        `(num_classes,)`.

    Example:
        >>> pool_top_k(np.array([[0.1, 0.5], [0.9, 0.3], [0.5, 0.4]]), k=2).tolist()
        [0.7, 0.45]
    """
    top = np.sort(similarities.astype(np.float64), axis=0)[::-1][:k]
    return np.asarray(top.mean(axis=0))


def slide_zero_shot(
    encoder: Encoder,
    benchmark: ImageSet,
    features: StrPath,
    out: StrPath,
    *,
    labels: Mapping[str, str] | StrPath | None = None,
    slides: StrPath | None = None,
    ks: Sequence[int] = KS,
    map_formats: Sequence[MapFormat] = (),
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Classifies slides by their patches, and writes scores, predictions and heat maps.

    Args:
        encoder: The two-tower encoder.
        benchmark: Classes and prompts.
        features: Folder of `SLIDE.h5` in the space of the texts; with `slides`, folder of
            coordinates.
        out: Folder for `metrics.json`, `metrics.md`, `predictions.csv`, `skipped.jsonl` and
            `maps/`; with `slides`, also `features/`.
        labels: Name of the class by slide, or a CSV with `slide_id` and `label`, for scores; slides
            without a label are only predicted.
        slides: Folder of slides whose features are computed first.
        ks: Numbers of patches k.
        map_formats: Formats of the heat maps of every slide; empty for none.
        batch_size: Number of patches per batch, with `slides`.
        seed: Seed of the bootstrap.

    Returns:
        The content of `metrics.json`.

    Raises:
        FileNotFoundError: If there are no files of features.
        ValueError: If no slide can be used or has a label, a label is not a class, or a slide has
            two labels.
    """
    folder, out, names = Path(features), Path(out), benchmark.names
    files = {path.stem: path for path in sorted(folder.glob("*.h5"))}
    if not files:
        raise FileNotFoundError(f"{folder}: no files SLIDE.h5")
    skipped: list[dict[str, str]] = []
    if isinstance(labels, str | os.PathLike):
        rows, skipped = read_label_table(labels, "slide_id", lambda name: name.removesuffix(".svs"))
        labels = {slide: row["label"] for slide, row in rows.items()}
    if wrong := sorted(set((labels or {}).values()) - set(names)):
        raise ValueError(
            f"label {wrong[0]!r}: no class of {benchmark.name}, which has {', '.join(names)}"
        )
    if labels and not set(labels) & set(files):
        raise ValueError(
            f"{folder}: no slide has a label: labels are of slides such as {min(labels)}, "
            f"and files such as {min(files)}.h5"
        )
    classes = class_features(prompt_features(encoder, benchmark)).numpy()
    read = _reader(encoder, slides, out, batch_size)
    out.mkdir(parents=True, exist_ok=True)
    pooled: dict[str, NDArray[np.float64]] = {}
    skipped += [
        {"id": slide, "reason": "has a label, but no file of features"}
        for slide in sorted(set(labels or ()) - set(files))
    ]
    for slide, file in tqdm(files.items(), desc="Slides", unit="slide", disable=None):
        try:
            vectors, coords, attributes = read(file)
            similarities = _similarities(encoder, vectors, classes, file)
            if map_formats:
                _draw(out / "maps", slide, coords, similarities, names, attributes, map_formats)
        except (ValueError, OSError) as error:
            skipped.append({"id": slide, "reason": str(error)})
            continue
        pooled[slide] = np.stack([pool_top_k(similarities, k) for k in ks])
    if not pooled:
        raise ValueError(f"{folder}: no slide can be used; the first: {skipped[:1]}")
    known = [slide for slide in pooled if labels is None or slide in labels]
    metrics: dict[str, Any] = {
        "task": "zero-shot classification of slides",
        "benchmark": benchmark.name,
        "model": encoder.name,
        "classes": names,
        "num_prompts": [len(benchmark.sentences(i)) for i in range(len(names))],
        "num_cut": num_cut_prompts(encoder, benchmark),
        "num_slides": len(pooled),
        "num_labelled": len(known) if labels else 0,
        "num_skipped": len(skipped),
        "top_k": {},
    }
    if labels and known:
        true = np.array([names.index(labels[slide]) for slide in known])
        for number, k in enumerate(ks):
            predicted = np.array([pooled[slide][number].argmax() for slide in known])
            metrics["top_k"][str(k)] = classification_scores(true, predicted, len(names), seed=seed)
    _write_predictions(out / "predictions.csv", pooled, labels or {}, ks, names)
    write_report(out, metrics, _tables(metrics), skipped)
    return metrics


def _write_predictions(
    path: Path,
    pooled: Mapping[str, NDArray[np.float64]],
    labels: Mapping[str, str],
    ks: Sequence[int],
    names: Sequence[str],
) -> None:
    """Writes a row per slide and k; `pooled` has similarities `(num_ks, num_classes)` by slide."""
    rows = [
        [slide, labels.get(slide, ""), k, names[scores.argmax()], *map("{:.5f}".format, scores)]
        for slide, found in pooled.items()
        for k, scores in zip(ks, found, strict=True)
    ]
    write_csv(path, ["id", "true", "k", "predicted", *names], rows)


_Features = tuple[NDArray[Any], NDArray[np.int64], Mapping[str, Any]]
"""Features `(N, dim)`, coordinates `(N, 2)` and their attributes."""


def _reader(
    encoder: Encoder, slides: StrPath | None, out: Path, batch_size: int
) -> Callable[[Path], _Features]:
    """Returns a function that reads the features of a slide, or computes them."""

    def read(file: Path) -> _Features:
        vectors, coords = read_features(file)
        attributes = read_feature_attributes(file)
        origin = TileOrigin.read(attributes)
        digest = str(attributes.get("weights_sha256") or origin.digest)
        if digest and digest != encoder.digest:
            raise ValueError(
                f"features {file}: of weights {digest[:12]}, but {encoder.name} has "
                f"{encoder.digest[:12]}"
            )
        made_by, model = known_encoder(origin.encoder), known_encoder(encoder.name)
        if not digest and made_by and model and made_by != model:
            raise ValueError(f"features {file}: of {made_by}, expected those of {model}")
        return vectors, coords, read_attributes(file)

    if slides is None:
        return read
    listing = SlideListing(slides)

    def compute(file: Path) -> _Features:
        found = slide_features(
            listing.find(read_coordinates(file).name), file, encoder, out / "features",
            batch_size=batch_size,
        )  # fmt: skip
        return found.features, found.coords, read_attributes(file)

    return compute


def _similarities(
    encoder: Encoder, vectors: NDArray[Any], classes: NDArray[np.float32], file: Path
) -> NDArray[np.float32]:
    if not len(vectors):
        raise ValueError(f"features {file}: no patches")
    # Features before the projection may be as wide as those after it, but are not normalised.
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
    projected = encoder.features_are_joint or np.allclose(lengths, 1, atol=_UNIT_TOLERANCE)
    if vectors.shape[1] != classes.shape[1] or not projected:
        raise ValueError(
            f"features {file}: width {vectors.shape[1]}, length {lengths.mean():.3g}; texts of "
            f"{encoder.name} have width {classes.shape[1]}, and features to compare with them are "
            "projected and of length 1. Compute them with slides="
        )
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=-1)
    return np.asarray(unit.numpy() @ classes.T)


def _draw(
    folder: Path,
    slide: str,
    coords: NDArray[np.int64],
    similarities: NDArray[Any],
    names: Sequence[str],
    attributes: Mapping[str, Any],
    formats: Sequence[MapFormat],
) -> None:
    if "patch_size_level0" not in attributes:
        raise ValueError(f"{slide}: no attribute patch_size_level0, which a map needs")
    folder.mkdir(parents=True, exist_ok=True)
    scores = PatchScores.with_attributes(
        slide,
        coords,
        int(attributes["patch_size_level0"]),
        dict(zip(names, similarities.T, strict=True)),
        attributes,
        classes=[names[index] for index in similarities.argmax(axis=1)],
    )
    for map_format in formats:
        write_score_map(folder, scores, map_format)


def _tables(metrics: Mapping[str, Any]) -> str:
    lines = head(metrics, f"{metrics['num_slides']} slides, {len(metrics['classes'])} classes")
    rows = ["| score, patches k | value | 95 % interval over slides |", "|---|---|---|"]
    for k, scores in metrics["top_k"].items():
        rows += [
            score_row(f"{name}, k = {k}", scores[name])
            for name in ("balanced_accuracy", "weighted_f1", "accuracy")
        ]
    if not metrics["top_k"]:
        rows = ["No labels: predictions.csv has the predicted classes."]
    return "\n".join([*lines, *rows, ""])
