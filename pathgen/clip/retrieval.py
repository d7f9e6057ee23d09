"""Evaluates retrieval, between images and captions and among images, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore import stats
from pathcore.encoders import Encoder
from pathcore.encoders.origin import TileOrigin
from pathcore.files import StrPath
from pathcore.image_features import image_features
from pathcore.image_sets import FileImage, ImageSet, read_images
from pathcore.images import find_image, path_inside
from pathcore.label_tables import read_label_table
from pathcore.rows import BadRow, pair_fault, read_rows_with_id
from pathgen.clip.reports import SCORE_HEAD, head, score_row, write_report
from wsi.store import read_feature_attributes, read_features

_QUERIES_AT_A_TIME = 1024  # bounds the memory of the similarity matrix


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

    Equal captions count as one caption, for which several images are right, and an image that
    several rows name counts as one image, for which several captions are right.

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
    captions, skipped = _read_pairs(pairs, folder)
    images = list(captions)
    out.mkdir(parents=True, exist_ok=True)
    found = image_features(
        encoder,
        images,
        Path(cache_dir) if cache_dir else out / "features",
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    kept = [captions[images[index]] for index in found.kept]
    number = {text: i for i, text in enumerate(dict.fromkeys(text for own in kept for text in own))}
    right = [[number[text] for text in own] for own in kept]
    text_features = encoder.encode_texts(list(number)).numpy()
    ranks = {
        "image_to_text": _ranks(found.features, text_features, right),
        "text_to_image": _ranks(text_features, found.features, _groups(right, len(number))),
    }
    skipped += found.skipped
    metrics: dict[str, Any] = {
        "task": "image-text retrieval",
        "benchmark": pairs.stem,
        "model": encoder.name,
        "num_images": len(kept),
        "num_captions": len(number),
        "num_cut": encoder.num_cut(list(number)),
        "num_skipped": len(skipped),
        **{name: _recalls(values, ks, seed) for name, values in ranks.items()},
    }
    write_report(out, metrics, _retrieval_tables(metrics, ks), skipped)
    return metrics


def _read_pairs(
    pairs: Path, folder: Path
) -> tuple[dict[FileImage, list[str]], list[dict[str, str]]]:
    """Returns the captions of each image, and `id` and `reason` of rows that cannot be used."""
    images: dict[Path, FileImage] = {}
    captions: dict[FileImage, list[str]] = {}
    skipped = []
    for number, row in read_rows_with_id(pairs):
        reason = row if isinstance(row, BadRow) else pair_fault(row)
        if isinstance(row, dict) and not reason:
            try:
                path = path_inside(folder, row["image"])
                image = images.setdefault(path, FileImage(row["id"], path))
                captions.setdefault(image, []).append(row["caption"])
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            found = row["id"] if isinstance(row, dict) else f"line {number}"
            skipped.append({"id": found, "reason": reason})
    if not captions:
        raise ValueError(f"{pairs}: no pair that can be used; the first: {skipped[:1]}")
    return captions, skipped


def _groups(right: Sequence[Sequence[int]], num_texts: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(num_texts)]
    for image, captions in enumerate(right):
        for caption in dict.fromkeys(captions):
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


@dataclass(frozen=True)
class LabelledFeatures:
    """Features to retrieve images, or slides, of the same class.

    Attributes:
        benchmark: Name of the data in reports.
        model: Name of the encoder in reports.
        features: float `(N, dim)`.
        labels: int64 `(N,)`, index of the class.
        groups: Slide or patient of each; None if they are not known.
        skipped: `id` and `reason` of what could not be used.
    """

    benchmark: str
    model: str
    features: NDArray[Any]
    labels: NDArray[np.int64]
    groups: tuple[str, ...] | None = None
    skipped: tuple[Mapping[str, Any], ...] = ()


def features_of_set(
    encoder: Encoder, image_set: ImageSet, data_path: StrPath, cache_dir: StrPath, **reading: Any
) -> LabelledFeatures:
    """Embeds a labelled image set; `reading` are arguments of `image_features`."""
    found = read_images(image_set, data_path)
    features = image_features(encoder, found.images, Path(cache_dir), **reading)
    return LabelledFeatures(
        image_set.name,
        encoder.name,
        features.features,
        np.array(found.labels, dtype=np.int64)[features.kept],
        skipped=(*found.skipped, *features.skipped),
    )


def features_of_table(
    encoder: Encoder | None,
    table: StrPath,
    data_path: StrPath,
    cache_dir: StrPath,
    **reading: Any,
) -> LabelledFeatures:
    """Embeds the images of a table, or reads the features of its slides.

    Args:
        encoder: The encoder; None if `data_path` holds `SLIDE.h5`, whose features are averaged.
        table: csv with columns `input` and `label` and, optionally, `group`.
        data_path: Folder of the images or features.
        cache_dir: Folder in which features of images are cached.
        **reading: Further arguments of `image_features`.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If it lacks a column or contradicts itself, nothing can be used, or features
            differ in width.
    """
    folder = Path(data_path)

    def find(name: str) -> Path:
        if encoder is None:
            return path_inside(folder, f"{name.removesuffix('.h5')}.h5")
        return find_image(folder, name)

    by_file, skipped = read_label_table(table, "input", find, optional=("group",))
    if not by_file:
        raise ValueError(f"table {table}: no row can be used; the first: {skipped[:1]}")
    rows = list(by_file.values())
    files = [FileImage(row["input"], path) for path, row in by_file.items()]
    if encoder is None:
        features, kept, unread = _slide_means(files)
        model = f"features in {data_path}"
    else:
        found = image_features(encoder, files, Path(cache_dir), **reading)
        features, kept, unread = found.features, found.kept, list(found.skipped)
        model = encoder.name
    classes = sorted({row["label"] for row in rows})
    own = [rows[index] for index in kept]
    return LabelledFeatures(
        Path(table).stem,
        model,
        features,
        np.array([classes.index(row["label"]) for row in own], dtype=np.int64),
        tuple(row["group"] for row in own) if "group" in rows[0] else None,
        (*skipped, *unread),
    )


def _slide_means(
    files: Sequence[FileImage],
) -> tuple[NDArray[Any], NDArray[np.int64], list[dict[str, str]]]:
    means, kept, skipped = [], [], []
    encoders: dict[str, Path] = {}
    for index, file in enumerate(files):
        try:
            features, _ = read_features(file.path)
            if not len(features):
                raise ValueError(f"features {file.path}: no patches")
            attributes = read_feature_attributes(file.path)
        except (ValueError, OSError) as error:
            skipped.append({"id": file.id, "reason": str(error)})
            continue
        means.append(features.astype(np.float32).mean(axis=0))
        kept.append(index)
        origin = TileOrigin.read(attributes)
        digest = str(attributes.get("weights_sha256") or origin.digest)
        if encoder := f"{origin.encoder} {digest[:12]}".strip():
            encoders.setdefault(encoder, file.path)
    if len(encoders) > 1:
        (one, first), (other, second), *_ = encoders.items()
        raise ValueError(
            f"features of several encoders: {first} of {one}, {second} of {other}; expected those "
            "of one encoder"
        )
    if not means:
        raise ValueError(f"none of {len(files)} slides can be used; the first: {skipped[:1]}")
    if len(widths := {len(mean) for mean in means}) > 1:
        raise ValueError(f"features of widths {sorted(widths)}; expected those of one encoder")
    return np.stack(means), np.array(kept), skipped


def image_retrieval(
    data: LabelledFeatures, out: StrPath, *, ks: Sequence[int] = (1, 5, 10), seed: int = 0
) -> dict[str, Any]:
    """Finds, for each image, images of its class among all others, and writes scores.

    Scores of a query are, among its k nearest images by cosine: `precision@k`, the fraction of its
    class; `recall@k`, whether one is of its class, as in image-text retrieval; `majority_vote@k`,
    whether its class is the most frequent, or among the most frequent the nearest. `map` is the
    mean average precision over all images. Of equally near images, those of other classes count as
    nearer, so that a model that maps everything to the same feature finds nothing.

    Images of a query's own group are no candidates, and intervals resample groups.

    Args:
        data: Features with classes and, optionally, groups.
        out: Folder for `metrics.json`, `metrics.md`, `skipped.jsonl`.
        ks: Numbers k of nearest images.
        seed: Seed of the bootstrap.

    Returns:
        The content of `metrics.json`. Queries for which there is no image of their class are left
        out and counted as `num_without_match`.

    Raises:
        ValueError: If no query has a match.
    """
    features, labels, groups = data.features, data.labels, data.groups
    owners = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    scores: dict[str, list[float]] = {"map": []}
    kept = []
    for start in range(0, len(unit), _QUERIES_AT_A_TIME):
        similarities = unit[start : start + _QUERIES_AT_A_TIME] @ unit.T
        for row, values in enumerate(similarities, start=start):
            candidates = np.flatnonzero(owners != owners[row])
            right = labels[candidates] == labels[row]
            if not right.any():
                continue
            kept.append(row)
            order = np.lexsort((right, -values[candidates]))
            _score_query(scores, right[order], labels[candidates][order], labels[row], ks)
    if not kept:
        raise ValueError(
            f"{data.benchmark}: no image of {len(labels)} has another one of its class"
            + (" in another group" if groups is not None else "")
        )
    clusters = None if groups is None else [groups[row] for row in kept]
    metrics: dict[str, Any] = {
        "task": "image-image retrieval",
        "benchmark": data.benchmark,
        "model": data.model,
        "num_images": len(labels),
        "num_queries": len(kept),
        "num_without_match": len(labels) - len(kept),
        "num_groups": None if groups is None else len(set(groups)),
        "num_skipped": len(data.skipped),
    }
    for name, found in scores.items():
        low, high = stats.mean_interval(found, clusters, seed=seed)
        metrics[name] = {"value": float(np.mean(found)), "low": low, "high": high}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_report(out, metrics, _image_tables(metrics, list(scores)), data.skipped)
    return metrics


def _score_query(
    scores: dict[str, list[float]],
    right: NDArray[np.bool_],
    labels: NDArray[np.int64],
    label: int,
    ks: Sequence[int],
) -> None:
    """Appends the scores of a query; `right` and `labels` are of the candidates, nearest first."""
    hits = np.flatnonzero(right)
    scores["map"].append(float((np.arange(1, len(hits) + 1) / (hits + 1)).mean()))
    for k in ks:
        near = labels[:k]
        classes, firsts, counts = np.unique(near, return_index=True, return_counts=True)
        voted = classes[np.lexsort((firsts, -counts))[0]]
        for name, value in (
            (f"precision@{k}", float(right[:k].mean())),
            (f"recall@{k}", float(right[:k].any())),
            (f"majority_vote@{k}", float(voted == label)),
        ):
            scores.setdefault(name, []).append(value)


def _image_tables(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    what = f"{metrics['num_queries']} queries among {metrics['num_images']} images"
    if metrics["num_groups"] is not None:
        what += f" of {metrics['num_groups']} groups"
    lines = head(metrics, what)
    if metrics["num_without_match"]:
        lines += [f"{metrics['num_without_match']} images have no match and are no queries.", ""]
    return "\n".join([*lines, *SCORE_HEAD, *(score_row(n, metrics[n]) for n in names), ""])


def _retrieval_tables(metrics: Mapping[str, Any], ks: Sequence[int]) -> str:
    lines = head(metrics, f"{metrics['num_images']} images, {metrics['num_captions']} captions")
    table = [*SCORE_HEAD]
    for name in ("image_to_text", "text_to_image"):
        label = name.replace("_", " ")
        table += [score_row(f"{label}, recall@{k}", metrics[name][f"recall@{k}"]) for k in ks]
        table.append(f"| {label}, median rank | {metrics[name]['median_rank']:g} | |")
    return "\n".join([*lines, *table, ""])
