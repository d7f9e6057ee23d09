"""Runs a sweep; each cell trains and tests a config and writes a file with its scores."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tqdm import tqdm

from cite.mm.config_file import read_config
from cite.splits import draw_slides, read_patches, write_patches
from cite.sweep import Cell, Sweep
from pathcore.files import file_identity, folder_lock, sha256_of, write_json
from pathcore.pool import WorkerDiedError, run_tasks


@dataclass(frozen=True)
class SweepPlan:
    """Settings of a sweep.

    Attributes:
        configs: Config file of each method; one without `train_dataloader` is only tested, once.
        train_file: Annotation file to draw training slides from; None to use `train_files`.
        num_slides: Numbers of training slides per class.
        seeds: Seeds of slides, weights and order.
        work_dir: Folder for the cells, the table and the plot.
        metric: Score of the table, one of the config's test evaluator.
        train_files: Path of annotation files with `{}` for the number of slides; slides are then
            the same for all seeds.
        options: Values that override all configs, as by `--cfg-options`.
    """

    configs: Mapping[str, str]
    train_file: str | None
    num_slides: Sequence[int]
    seeds: Sequence[int]
    work_dir: str
    metric: str = "accuracy"
    train_files: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Returns all cells, sorted by seed and number of slides.

        Raises:
            ValueError: If both or neither of `train_file` and `train_files` are given, or the
                latter has no `{}`, so that all numbers of slides would train on one file.
        """
        if (self.train_file is None) == (self.train_files is None):
            raise ValueError("expected either a file to draw slides from, or files with {}")
        if self.train_files is not None and self.train_files.count("{}") != 1:
            raise ValueError(
                f"--train-files {self.train_files}: expected one {{}} for the number of slides"
            )
        cells = []
        for method, file in self.configs.items():
            trains = read_config(file).get("train_dataloader") is not None
            numbers = self.num_slides if trains else [0]
            seeds = self.seeds if trains else self.seeds[:1]
            cells += [Cell(method, number, seed) for number in numbers for seed in seeds]
        return sorted(cells, key=lambda cell: (cell.seed, cell.num_slides))

    def folder(self, cell: Cell) -> Path:
        """Returns the work folder of a cell."""
        return Path(self.work_dir) / cell.method / f"slides{cell.num_slides}_seed{cell.seed}"


def run_sweep(plan: SweepPlan, *, jobs: int = 1, progress: bool = True) -> dict[Cell, str]:
    """Runs the cells that have no scores yet; only one process at a time may run a sweep.

    Args:
        plan: Settings of the sweep.
        jobs: Number of processes.
        progress: Whether to show a progress bar.

    Returns:
        Error message of each cell that failed, or whose process was killed.

    Raises:
        FolderInUseError: If another process runs a sweep in this folder.
        ValueError: If both or neither of `train_file` and `train_files` are given.
    """
    cells = plan.cells()
    Path(plan.work_dir).mkdir(parents=True, exist_ok=True)
    with folder_lock(Path(plan.work_dir, ".lock")):
        missing = [cell for cell in cells if read_scores(plan, cell) is None]
        return _run_cells(plan, missing, jobs, progress)


def _run_cells(plan: SweepPlan, cells: list[Cell], jobs: int, progress: bool) -> dict[Cell, str]:
    failures: dict[Cell, str] = {}

    def record(cell: Cell, error: WorkerDiedError) -> Iterable[Cell]:
        failures[cell] = str(error)
        return ()

    # Cells use the GPU if there is one, which a forked process could not.
    can_fork = not torch.cuda.is_available()
    done = run_tasks(
        partial(run_cell, plan), cells, workers=jobs, can_fork=can_fork, on_death=record
    )
    for cell, message in tqdm(done, total=len(cells), disable=not progress):
        if message is not None:
            failures[cell] = message
    return failures


def run_cell(plan: SweepPlan, cell: Cell) -> tuple[Cell, str | None]:
    """Trains and tests a cell; an interrupted one resumes from its last checkpoint.

    Returns:
        The cell, and an error message or None.
    """
    folder = plan.folder(cell)
    try:
        _begin(folder, _inputs(plan, cell))
        config = cell_config(plan, cell)
        runner = Runner.from_cfg(config)
        if config.get("train_dataloader") is not None:
            runner.train()
        scores = runner.test()
        write_json(folder / "scores.json", scores)
    except (Exception, SystemExit) as error:
        # One of possibly hundreds of cells must not stop the others. The error is recorded and
        # reported at the end, and the next call runs the cell again.
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return cell, f"{type(error).__name__}: {error}"
    return cell, None


def cell_config(plan: SweepPlan, cell: Cell) -> Config:
    """Returns the config of a cell; writes its annotation file if slides are drawn."""
    config = read_config(plan.configs[cell.method], plan.options)
    config.work_dir = str(plan.folder(cell))
    config.experiment_name = f"{cell.method}_{cell.num_slides}_{cell.seed}_{os.getpid()}"
    config.randomness = {"seed": cell.seed}
    config.log_level = logging.getLevelName(logging.WARNING)
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    if cell.num_slides:
        dataset = config.train_dataloader.dataset
        dataset.ann_file = os.path.abspath(_write_slides(plan, cell))
        config.train_dataloader.sampler.seed = cell.seed
        config.resume = True
    return config


def read_scores(plan: SweepPlan, cell: Cell) -> dict[str, float] | None:
    """Returns the scores of a cell; None if there are none, or inputs have changed."""
    folder = plan.folder(cell)
    if not (folder / "scores.json").is_file() or not _is_of(folder, _inputs(plan, cell)):
        return None
    scores: dict[str, float] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return scores


def collect(plan: SweepPlan) -> Sweep:
    """Returns the scores of the plan's metric.

    Raises:
        ValueError: If the configs do not compute it.
    """
    found = {}
    for cell in plan.cells():
        scores = read_scores(plan, cell)
        if scores is None:
            continue
        if plan.metric not in scores:
            raise ValueError(
                f"{plan.configs[cell.method]}: no score {plan.metric!r}; it has "
                f"{', '.join(sorted(scores))}"
            )
        found[cell] = scores[plan.metric]
    return Sweep({cell: found[cell] for cell in _by_method(plan, found)})


def _begin(folder: Path, inputs: dict[str, Any]) -> None:
    """Empties the folder of a cell with other inputs, whose checkpoint must not be resumed."""
    if not _is_of(folder, inputs):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "inputs.json", inputs)


def _is_of(folder: Path, inputs: dict[str, Any]) -> bool:
    file = folder / "inputs.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == inputs


def _write_slides(plan: SweepPlan, cell: Cell) -> Path:
    if plan.train_file is None:
        return Path(str(plan.train_files).replace("{}", str(cell.num_slides)))
    file = plan.folder(cell) / "train.txt"
    patches = [patch for _, patch in read_patches(plan.train_file)]
    write_patches(file, draw_slides(patches, cell.num_slides, seed=cell.seed))
    return file


def _inputs(plan: SweepPlan, cell: Cell) -> dict[str, Any]:
    config = Config.fromfile(plan.configs[cell.method], import_custom_modules=False)
    config.merge_from_dict(dict(plan.options))
    train = plan.train_file or str(plan.train_files).replace("{}", str(cell.num_slides))
    digests = {
        value: _digest(*file_identity(value))
        for value in {train, *_strings(config._cfg_dict)}
        if os.path.isfile(value)
    }
    return {"config": config.pretty_text, "train": os.path.abspath(train), "sha256": digests}


def _strings(value: Any) -> Iterator[str]:
    """Yields the texts of a config, also annotation files joined with their `data_root`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if value.get("ann_file"):
            yield os.path.join(value.get("data_root") or "", value["ann_file"])
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


@functools.cache
def _digest(path: str, *_identity: int) -> str:
    return sha256_of(path)


def _by_method(plan: SweepPlan, found: Mapping[Cell, float]) -> list[Cell]:
    order = list(plan.configs)
    return sorted(found, key=lambda c: (order.index(c.method), c.num_slides, c.seed))
