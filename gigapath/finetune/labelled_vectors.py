"""Vectors with labels, to evaluate an encoder: of images, of tile embeddings, or of slides.

Images are embedded once and cached. A slide is represented by the mean of its features, which for a
slide embedding is the embedding itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gigapath.finetune.bags import SlideFolder, one_encoder
from gigapath.published.embedding_zip import (
    SPLITS,
    EmbeddingData,
    EmbeddingSplit,
    class_names,
    read_embeddings,
    read_labels,
    sort_rows,
)
from pathcore.encoders import Encoder
from pathcore.files import StrPath
from pathcore.image_features import image_features
from pathcore.image_sets import FileImage, HDF5Image, ImageSet, LabelledImages, read_images
from pathcore.images import find_image


def read_vectors(
    path: StrPath,
    table: StrPath | None = None,
    *,
    embed_dim: int | None = None,
    progress: bool = True,
) -> EmbeddingData:
    """Reads tile embeddings as published, or one vector per slide from a folder of `SLIDE.h5`.

    Args:
        path: Zip or folder of `.pt` files, or folder of `.h5` files.
        table: csv with `input` (name of the file), `label` and `split`; see `read_embeddings`.
        embed_dim: Width of tile embeddings; by default the width that most of them have.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If there are no embeddings or there is no table.
        ValueError: If the table cannot be used, or a split has no usable vectors. Slides of another
            encoder than most are skipped, see `one_encoder`.
    """
    folder = Path(path)
    if not (folder.is_dir() and any(folder.glob("*.h5"))):
        return read_embeddings(path, table, embed_dim=embed_dim, progress=progress)
    slides = SlideFolder(folder, needs_coords=False)
    rows = read_labels(table, path)
    good, skipped = sort_rows(rows, lambda name, _: slides.file(name), table)
    vectors: dict[str, Tensor] = {}
    encoders, reasons = {}, {}
    for row in good:
        name = row["input"]
        try:
            encoders[name] = slides.encoder(name)
            vectors[name] = slides.read(name).features.mean(dim=0)
        except (ValueError, OSError) as error:
            reasons[name] = str(error)
    width, _, others = one_encoder({name: (len(v), encoders[name]) for name, v in vectors.items()})
    reasons |= others
    skipped += [
        {"id": row["input"], "split": row["split"], "reason": reasons[row["input"]]}
        for row in good
        if row["input"] in reasons
    ]
    kept = [row for row in good if row["input"] not in reasons]
    classes = class_names(row["label"] for row in kept)
    found = {}
    for split in SPLITS:
        rows = [row for row in kept if row["split"] == split]
        labels = [classes.index(row["label"]) for row in rows]
        own = [vectors[row["input"]] for row in rows]
        features = torch.stack(own) if own else torch.empty(0, width)
        found[split] = EmbeddingSplit(
            tuple(row["input"] for row in rows), features, np.array(labels, dtype=np.int64)
        )
    named = {row["input"].removesuffix(".svs") for row in good}
    data = EmbeddingData(classes, found, tuple(skipped), len(set(slides.slides()) - named))
    return _checked(data, path)


def labelled_images(
    folder: StrPath,
    *,
    table: StrPath | None = None,
    image_set: ImageSet | None = None,
    train: StrPath | None = None,
    val: StrPath | None = None,
) -> tuple[tuple[str, ...], dict[str, LabelledImages]]:
    """Finds the images of each split.

    Args:
        folder: Folder of the images of the table; or of the set's test images.
        table: csv with `input` (name of the image), `label` and `split`.
        image_set: A labelled image set, instead of a table.
        train: Folder of its training images; by default those that the set names in `folder`.
        val: Folder of its validation images; by default those that the set names in `folder`, or
            none.

    Returns:
        Names of the classes, and images by split.

    Raises:
        FileNotFoundError: If data are missing, or the set does not say which images to train on.
        ValueError: If neither or both of table and set are given, the data do not fit, or an image
            is in two splits.
    """
    if (table is None) == (image_set is None):
        raise ValueError("images: expected either a table of labels or an image set")
    if image_set is None:
        return _images_of_table(Path(folder), table)
    parts = {"test": read_images(image_set, folder)}
    for name, other in (("train", train), ("val", val)):
        if other is not None:
            parts[name] = read_images(image_set, other)
        elif name in image_set.splits:
            parts[name] = read_images(image_set.split(name), folder)
    if "train" not in parts:
        raise FileNotFoundError(
            f"image set {image_set.name}: does not say which images of {folder} to train on; give "
            "the folder of its training images, or a table of labels"
        )
    owner: dict[FileImage | HDF5Image, str] = {}
    for name, part in parts.items():
        for image in part.images:
            other = owner.setdefault(replace(image, id="", path=image.path.absolute()), name)
            if other != name:
                raise ValueError(
                    f"image set {image_set.name}: image {image.id} is in splits {other} and "
                    f"{name}; name folders that have no images in common"
                )
    return tuple(image_set.names), parts


def embed_images(
    encoder: Encoder,
    classes: tuple[str, ...],
    parts: Mapping[str, LabelledImages],
    cache_dir: StrPath,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> EmbeddingData:
    """Embeds labelled images with `Encoder.features`; see `pathcore.image_features`.

    Args:
        encoder: The encoder.
        classes: Names of the classes.
        parts: Images by split, see `labelled_images`.
        cache_dir: Folder in which features are cached.
        batch_size: Number of images per batch.
        num_workers: Number of processes that read images.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no image of a split can be read.
    """
    splits, skipped = {}, []
    for name in SPLITS:
        part = parts.get(name, LabelledImages((), ()))
        skipped += [{**row, "split": name} for row in part.skipped]
        if not part.images:
            continue
        found = image_features(
            encoder,
            part.images,
            Path(cache_dir),
            joint=False,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=progress,
        )
        skipped += [{**row, "split": name} for row in found.skipped]
        splits[name] = EmbeddingSplit(
            tuple(part.images[index].id for index in found.kept),
            torch.from_numpy(found.features),
            np.array(part.labels, dtype=np.int64)[found.kept],
        )
    empty = EmbeddingSplit((), torch.empty(0, encoder.embed_dim), np.zeros(0, dtype=np.int64))
    data = EmbeddingData(
        classes, {name: splits.get(name, empty) for name in SPLITS}, tuple(skipped), 0
    )
    return _checked(data, encoder.name)


def _images_of_table(
    folder: Path, table: StrPath | None
) -> tuple[tuple[str, ...], dict[str, LabelledImages]]:
    rows = read_labels(table, folder)
    good, skipped = sort_rows(rows, lambda name, _: find_image(folder, name).resolve(), table)
    classes = class_names(row["label"] for row in good)
    images: dict[str, list[FileImage]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row in good:
        try:
            path = find_image(folder, row["input"])
        except ValueError as error:
            skipped.append({"id": row["input"], "split": row["split"], "reason": str(error)})
            continue
        images[row["split"]].append(FileImage(row["input"], path))
        labels[row["split"]].append(classes.index(row["label"]))
    return classes, {
        split: LabelledImages(
            tuple(images[split]),
            tuple(labels[split]),
            tuple(
                {"id": row["id"], "reason": row["reason"]}
                for row in skipped
                # A row of an unknown split is reported once, with the training images.
                if (row["split"] if row["split"] in SPLITS else "train") == split
            ),
        )
        for split in SPLITS
    }


def _checked(data: EmbeddingData, source: StrPath) -> EmbeddingData:
    if len(data.classes) < 2:
        raise ValueError(f"{source}: expected at least two labels, found {list(data.classes)}")
    for name in ("train", "test"):
        if not data.splits[name].ids:
            raise ValueError(
                f"{source}: nothing of split {name} can be used; the first fault: "
                f"{next(iter(data.skipped), None)}"
            )
    return data
