"""Slides of a fine-tuning run: labels, splits, and the files that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigapath.embed.slide_vectors import NUM_GRIDS
from gigapath.finetune.bags import CELL_PX, SlideFolder, SlideScan
from gigapath.finetune.patho_bench import PathoBenchTask
from gigapath.finetune.settings import FinetuneSettings
from gigapath.finetune.splits import (
    PARTS,
    Split,
    check_parts,
    make_splits,
    read_splits,
    write_splits,
)
from gigapath.finetune.tasks import LabelledSlides, SlideTask, read_labels
from gigapath.slide_encoder import ARCHITECTURES
from pathcore.files import StrPath


@dataclass(frozen=True)
class Cohort:
    """Slides of a run.

    Attributes:
        labels: Label of each slide.
        splits: Usable slides of each fold.
        num_tiles: Number of tiles of each slide.
        skipped: `id` and `reason` of skipped rows and slides.
        num_without_row: Number of feature files that the table does not name.
        encoder: Tile encoder of the features, as the files name it; empty if they do not.
        input_dim: Width of the features.
    """

    labels: Mapping[str, Any]
    splits: Mapping[int, Split]
    num_tiles: Mapping[str, int]
    skipped: tuple[dict[str, str], ...]
    num_without_row: int
    encoder: str
    input_dim: int


def read_cohort(
    folder: SlideFolder,
    table: StrPath | PathoBenchTask,
    task: SlideTask,
    out: Path,
    splits: StrPath | None,
    settings: FinetuneSettings,
    progress: bool,
    only_folds: Sequence[int] = (),
) -> Cohort:
    """Reads the tables and checks every slide.

    Args:
        folder: Tile embeddings.
        table: csv with `slide_id`, labels and, optionally, patients, or a task of Patho-Bench.
        task: What is predicted.
        out: Folder for the usable splits and the result of the check.
        splits: Folder of tables, or None to make splits.
        settings: Settings of the training.
        progress: Whether to show a progress bar.
        only_folds: Numbers of the folds to run; all if empty.

    Raises:
        FileNotFoundError: If a table or fold does not exist.
        ValueError: If tables contradict themselves, or a fold has no usable slides or nothing to
            learn from.
    """
    unknown: list[dict[str, str]] = []
    if isinstance(table, PathoBenchTask):
        labelled = table.labelled
        made = dict(list(table.splits.items())[: settings.folds or None])
    else:
        labelled = read_labels(table, task)
        made, unknown = _splits(labelled, splits, settings)
    if missing := [fold for fold in only_folds if fold not in made]:
        raise FileNotFoundError(f"no folds {missing}, only {list(made)}")
    made = {fold: made[fold] for fold in only_folds or made}
    slides = sorted(
        {slide for split in made.values() for p in PARTS for slide in getattr(split, p)}
    )
    grid = _grid(settings) if folder.cell_px is not None else None
    scan = SlideScan(folder, slides, settings.input_dim, grid).run(
        out / "slides.json", num_workers=settings.num_workers, progress=progress
    )
    num_tiles, bad = scan.num_tiles, scan.skipped
    if not num_tiles:
        raise ValueError(f"features {folder.path}: no slide can be used: {bad[0]['reason']}")
    usable = {fold: split.only(num_tiles) for fold, split in made.items()}
    for fold, split in usable.items():
        check_parts(split, fold, with_val=settings.needs_val)
        _check_can_learn(split.train, fold, labelled, task)
    write_splits(out / "splits", usable)
    rows = {row["id"]: row for row in (*labelled.skipped, *unknown, *bad)}
    listed = [s for i in labelled.labels for s in folder.slides_of.get(i, (i,))]
    named = {slide.removesuffix(".svs") for slide in (*listed, *rows)}
    labels = {slide: labelled.labels[slide] for slide in num_tiles}
    return Cohort(
        labels,
        usable,
        num_tiles,
        tuple(rows.values()),
        len(set(folder.slides()) - named),
        scan.encoder,
        scan.in_chans,
    )


def slide_folder(
    path: StrPath, settings: FinetuneSettings, *, on_grid: bool, needs_coords: bool
) -> SlideFolder:
    """Returns the tile embeddings as the training reads them.

    Args:
        path: The folder.
        settings: Settings of the training.
        on_grid: Whether the slide encoder is among the methods, whose grid the tiles must fit.
        needs_coords: Whether files without coordinates are refused.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"features {path}: no such folder")
    options = {**ARCHITECTURES.get(settings.model_arch, {}), **settings.encoder}
    checked = on_grid and options.get("out_of_grid") != "original"
    return SlideFolder(Path(path), needs_coords, settings.tile_size if checked else None)


def _check_can_learn(
    train: Sequence[str], fold: int, labelled: LabelledSlides, task: SlideTask
) -> None:
    """Raises ValueError if all training slides have one class, or none has an event."""
    if task.several_labels:
        return
    found = {labelled.stratum(slide) for slide in train}
    if task.is_survival and 1 not in found:
        raise ValueError(
            f"fold {fold}: none of {len(train)} slides of train has an event (column "
            f"{task.event_column}), so no risk can be learned; give other splits"
        )
    if not task.is_survival and len(found) == 1:
        raise ValueError(
            f"fold {fold}: all {len(train)} usable slides of train are "
            f"{task.classes[found.pop()]}, so no classes can be told apart; give other splits"
        )


def _grid(settings: FinetuneSettings) -> tuple[int, int]:
    """Returns side and number of the cells of the encoder's grid."""
    options = {**ARCHITECTURES[settings.model_arch], **settings.encoder}
    return settings.tile_size or CELL_PX, int(options.get("slide_ngrids", NUM_GRIDS))


def _splits(
    labelled: LabelledSlides,
    splits: StrPath | None,
    settings: FinetuneSettings,
) -> tuple[dict[int, Split], list[dict[str, str]]]:
    if splits is not None:
        return read_splits(splits, labelled, folds=settings.folds, split_key=settings.split_key)
    made = make_splits(
        labelled,
        method=settings.split_method,
        folds=settings.folds,
        val_r=settings.val_r,
        test_r=settings.test_r,
        split_key=settings.split_key,
        seed=settings.seed,
    )
    return made, []
