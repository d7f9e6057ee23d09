"""Predicts slide classes or risks from tile embeddings: slide encoder, bag models, baselines.

Each method and fold has a folder `METHOD/fold_K/` with weights, predictions, scores and curves;
`results.json`, `results.md` and `summary.csv` cover all of them. All methods see the same slides in
the same splits. A run that was stopped continues when it is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gigapath.classification_head import ClassificationHead
from gigapath.finetune.attention_maps import draw_attention_maps
from gigapath.finetune.bags import (
    CELL_PX,
    SlideBags,
    SlideFolder,
    derived_seed,
    pooled_vectors,
    stored_vectors,
)
from gigapath.finetune.baselines import METHODS, SURVIVAL_METHODS, VectorSplit, check_methods
from gigapath.finetune.cohort import Cohort, read_cohort, slide_folder
from gigapath.finetune.metrics import plain_values, score_names
from gigapath.finetune.mil import MODELS, BagModel, MILModel
from gigapath.finetune.patho_bench import PathoBenchTask
from gigapath.finetune.result_files import (
    RESULTS_NAME,
    SKIPPED_NAME,
    TABLE_NAME,
    results_table,
    score_part,
    spread,
)
from gigapath.finetune.settings import FinetuneSettings
from gigapath.finetune.splits import (
    PARTS,
    Split,
    check_parts,
)
from gigapath.finetune.tasks import SlideTask, read_task
from gigapath.finetune.trainer import WEIGHTS_NAME, Trainer, check_inputs
from pathcore.files import StrPath, folder_lock, remove_partials, write_json, write_text
from pathcore.ranks import Ranks
from pathcore.rows import write_csv, write_rows
from wsi.heat_map import MapFormat

SLIDE_ENCODER = "slide_encoder"

_BASELINES = {**METHODS, **SURVIVAL_METHODS}

_WEIGHTS = 3  # keeps the seed of the weights apart from the seeds of the trainer, 0 to 2


def finetune_slides(
    features: StrPath,
    table: StrPath | PathoBenchTask,
    task: SlideTask | StrPath | None,
    out: StrPath,
    *,
    splits: StrPath | None = None,
    settings: FinetuneSettings | None = None,
    methods: Sequence[str] = (SLIDE_ENCODER,),
    models: Mapping[str, BagModel] | None = None,
    vectors: StrPath | None = None,
    only_folds: Sequence[int] = (),
    seeds: Sequence[int] = (),
    heat_maps: bool = False,
    map_formats: Sequence[MapFormat] = ("png",),
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains and tests slide classifiers on each fold.

    Under torchrun the processes share the work; effective batch and result stay the same.

    Args:
        features: Folder with `SLIDE.h5` or `SLIDE.pt` per slide.
        table: csv with `slide_id`, labels and, optionally, patients in `pat_id` or `case_id`; or a
            task of Patho-Bench, which includes task and splits. For its folds without validation
            samples, the last epoch is kept.
        task: The task, or its YAML file; None with a task of Patho-Bench.
        out: Output folder; the same call continues a run that was stopped.
        splits: Folder with `train_0.csv`, `val_0.csv`, `test_0.csv` ... or CLAM's `splits_0.csv`
            ...; by default splits are made from the table.
        settings: Settings of the training.
        methods: `slide_encoder`, names of `gigapath.finetune.mil.MODELS` or `models`, `knn`,
            `logistic`; for survival `cox` instead of the last two.
        models: Further bag models by method name; they take precedence over built-in ones.
        vectors: Folder of slide embeddings for `knn` and `logistic`; by default they use the mean
            over a slide's tiles.
        only_folds: Numbers of the folds to run; all if empty.
        seeds: Seeds to train each fold with, each in its own `fold_K_seed_S`; the splits stay those
            of `settings.seed`. By default only `settings.seed`, in `fold_K`.
        heat_maps: Whether to draw the attention of bag models over each test slide.
        map_formats: Formats of the heat maps.
        device: `cuda` or `cpu`; by default a GPU if there is one.
        progress: Whether to show progress bars.

    Returns:
        The content of `results.json`.

    Raises:
        FileNotFoundError: If tables, task, splits, weights or features do not exist.
        ValueError: If tables contradict themselves, a fold has no usable slides, weights do not
            fit, or the folder holds another run.
    """
    out, models = Path(out), {**MODELS, **(models or {})}
    task, settings, slides_of = _task_of(table, task, settings or FinetuneSettings(), methods)
    methods = check_methods(methods, (SLIDE_ENCODER, *models), survival=task.is_survival)
    _check_methods_fit(methods, models, task, settings, heat_maps=heat_maps)
    on_grid = SLIDE_ENCODER in methods
    folder = replace(
        slide_folder(features, settings, on_grid=on_grid, needs_coords=on_grid or heat_maps),
        slides_of=slides_of,
    )
    with Ranks(device) as ranks, ExitStack() as stack:
        if on_grid and settings.input_dim:
            # Detects missing or unsuitable weights before hours of reading slides.
            _head(settings, settings.input_dim, len(task.classes))
        if ranks.is_first:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(out / ".lock"))
            remove_partials(out)
        cohort = ranks.first(
            partial(read_cohort, folder, table, task, out, splits, settings, progress, only_folds)
        )
        settings = replace(settings, input_dim=cohort.input_dim)
        maps = map_formats if heat_maps else ()
        runs = Runs(
            cohort, task, settings, folder, out, models, ranks, progress, vectors, seeds, maps
        )
        found = {method: runs.finish(method) for method in methods}
        results = {
            "task": asdict(task),
            "features": str(features),
            "encoder": cohort.encoder,
            "settings": asdict(settings),
            "num_slides": len(cohort.num_tiles),
            "num_tiles": sum(cohort.num_tiles.values()),
            "num_skipped": len(cohort.skipped) + len(runs.skipped),
            "num_without_row": cohort.num_without_row,
            "untrained": _untrained(cohort, task),
            "methods": found,
        }
        if ranks.is_first:
            write_rows(out / SKIPPED_NAME, [*cohort.skipped, *runs.skipped])
            write_text(out / TABLE_NAME, _table(results, task))
            _write_summary(out / "summary.csv", results)
            write_json(out / RESULTS_NAME, results)
        ranks.barrier()
    return results


def _task_of(
    table: StrPath | PathoBenchTask,
    task: SlideTask | StrPath | None,
    settings: FinetuneSettings,
    methods: Sequence[str],
) -> tuple[SlideTask, FinetuneSettings, Mapping[str, tuple[str, ...]]]:
    """Returns the task, settings adapted to it, and the slides of samples that have several."""
    slides_of: Mapping[str, tuple[str, ...]] = {}
    if isinstance(table, PathoBenchTask):
        task, slides_of = table.task, table.slides
        if not all(split.val for split in table.splits.values()):
            settings = replace(settings, model_select="last_epoch", patience=0)
        if SLIDE_ENCODER in methods and any(len(slides) > 1 for slides in slides_of.values()):
            raise ValueError(
                f"{SLIDE_ENCODER}: the samples of {task.name} have several slides, whose positions "
                "are unrelated; use a bag model, or knn, logistic or cox"
            )
    elif task is None:
        raise ValueError("task: expected a task or its file, found None")
    task = task if isinstance(task, SlideTask) else read_task(task)
    if task.is_survival and settings.monitor == FinetuneSettings.monitor:
        settings = replace(settings, monitor="c_index")
    return task, settings, slides_of


def _check_methods_fit(
    methods: Sequence[str],
    models: Mapping[str, BagModel],
    task: SlideTask,
    settings: FinetuneSettings,
    *,
    heat_maps: bool,
) -> None:
    """Raises ValueError if the settings do not fit the methods or the task."""
    for method in methods:
        _settings_of(method, settings, models, task)
    if settings.monitor not in (known := ("loss", *score_names(task.setting))):
        raise ValueError(f"monitor {settings.monitor!r}: expected one of {', '.join(known)}")
    drawn = [name for name, model in models.items() if model.draws_attention()]
    if heat_maps and not set(methods) & set(drawn):
        raise ValueError(
            f"heat_maps: none of the methods {', '.join(methods)} has attention over tiles; "
            f"expected one of {', '.join(drawn)}"
        )


class Runs:
    """All folds of all methods.

    Args:
        cohort: The slides.
        task: What is predicted.
        settings: Settings of the training.
        folder: Tile embeddings.
        out: Output folder.
        models: Bag models by method name.
        ranks: The processes of the training.
        progress: Whether to show progress bars.
        vectors: Folder of slide embeddings, or None for the mean over tiles.
        seeds: Seeds of the trained methods; empty for `settings.seed`.
        heat_maps: Formats of the attention maps; empty for none.

    Attributes:
        skipped: `id` and `reason` of slides without a usable slide embedding.
    """

    def __init__(
        self,
        cohort: Cohort,
        task: SlideTask,
        settings: FinetuneSettings,
        folder: SlideFolder,
        out: Path,
        models: Mapping[str, BagModel],
        ranks: Ranks,
        progress: bool,
        vectors: StrPath | None,
        seeds: Sequence[int] = (),
        heat_maps: Sequence[MapFormat] = (),
    ) -> None:
        self.cohort, self.task, self.settings, self.folder = cohort, task, settings, folder
        self.out, self.models, self.ranks, self.progress = out, models, ranks, progress
        self.vectors_folder, self.seeds, self.heat_maps = vectors, seeds, heat_maps
        self.skipped: list[dict[str, str]] = []
        self._vectors: dict[str, Any] | None = None

    def finish(self, method: str) -> dict[str, Any]:
        """Trains and tests a method on all folds."""
        folds = []
        for fold, split in self.cohort.splits.items():
            folder = self.out / method / f"fold_{fold}"
            if method in _BASELINES:
                scores = self.ranks.first(
                    lambda s=split, f=folder: self._compare(method, s, f)  # type: ignore[misc]
                )
            elif not self.seeds:
                scores = self._train(method, fold, split, folder, self.settings)
            else:
                for seed in self.seeds:
                    own = replace(self.settings, seed=seed)
                    scores = self._train(method, fold, split, Path(f"{folder}_seed_{seed}"), own)
                    folds.append({"fold": fold, "seed": seed, **scores})
                continue
            folds.append({"fold": fold, **scores})
        tests = [scores["test"] for scores in folds]
        return {"folds": folds, "mean": spread(tests, self.task.setting)}

    def _train(
        self, method: str, fold: int, split: Split, folder: Path, settings: FinetuneSettings
    ) -> dict[str, Any]:
        build: Callable[..., nn.Module] = partial(_head, settings)
        options: Mapping[str, Any] = {}
        settings = _settings_of(method, settings, self.models, self.task)
        if method in self.models:
            options = self.models[method].options
            build = partial(self.models[method].build, **options)
            if not split.val:
                settings = replace(settings, model_select="last_epoch", patience=0)
        parts = {
            part: SlideBags(
                self.folder,
                getattr(split, part),
                self.cohort.labels,
                max_tiles=_limit(settings, self.task, part),
                tile_order="published" if settings.protocol == "published" else "row_major",
                shuffle=self.task.shuffle_tiles,
            )
            for part in PARTS
            if getattr(split, part)
        }
        torch.manual_seed(derived_seed(settings.seed, _WEIGHTS, fold))
        model = build(settings.input_dim, len(self.task.classes))
        trainer = Trainer(
            model, self.task, settings, parts, folder, self.ranks, progress=self.progress
        )
        slides = [slide for part in parts.values() for slide in part.slides]
        inputs = {
            "method": method,
            "task": asdict(self.task),
            "settings": settings.of_training(),
            "features": str(self.folder.path.absolute()),
            "encoder": self.cohort.encoder,
            "model": dict(options),
            "slides": asdict(split),
            "labels": {slide: self.cohort.labels[slide].tolist() for slide in slides},
            "feature files": {slide: self.folder.identity(slide) for slide in slides},
        }
        scores = trainer.finish(inputs)
        drawn = self.heat_maps and self.ranks.is_first
        if drawn and isinstance(model, MILModel) and model.has_attention:
            draw_attention_maps(
                model,
                folder / WEIGHTS_NAME,
                self.folder,
                split.test,
                folder / "attention",
                self.ranks.device,
                self.heat_maps,
            )
        return scores

    def _compare(self, method: str, split: Split, folder: Path) -> dict[str, Any]:
        if self._vectors is None:
            self._vectors = self._read_vectors()
        vectors, labels = self._vectors, self.cohort.labels
        split = split.only(vectors)
        check_parts(split, int(folder.name.removeprefix("fold_")), with_val=False)
        parts = {
            part: VectorSplit(
                getattr(split, part),
                np.stack([vectors[slide] for slide in getattr(split, part)]),
                np.stack([labels[slide] for slide in getattr(split, part)]),
            )
            for part in PARTS
            if getattr(split, part)
        }
        source = self.vectors_folder or self.folder.path
        check_inputs(folder, {"method": method, "vectors": str(source), "slides": asdict(split)})
        predict = _BASELINES[method](parts["train"], parts.get("val"), len(self.task.classes))
        scores: dict[str, Any] = {}
        for part in ("val", "test"):
            if part in parts:
                own = parts[part]
                scores[part] = score_part(
                    folder,
                    part,
                    own.ids,
                    own.labels,
                    predict(own.vectors),
                    self.task.classes,
                    self.task.setting,
                    num_resamples=self.settings.num_resamples,
                    seed=self.settings.seed,
                )
        write_json(folder / "metrics.json", scores)
        return scores

    def _read_vectors(self) -> dict[str, Any]:
        slides = list(self.cohort.num_tiles)
        if self.vectors_folder is None:
            return pooled_vectors(self.folder, slides, progress=self.progress)
        vectors, self.skipped = stored_vectors(self.vectors_folder, slides, self.folder.slides_of)
        return vectors


def _settings_of(
    method: str, settings: FinetuneSettings, models: Mapping[str, BagModel], task: SlideTask
) -> FinetuneSettings:
    """Returns the settings with the method's own defaults.

    Raises:
        ValueError: If they do not suit the task.
    """
    if method in models:
        settings = replace(settings, **models[method].settings)
        if task.is_survival:
            settings = replace(settings, **models[method].survival_settings)
    if task.is_survival and method not in _BASELINES and settings.batch_size < 2:
        raise ValueError(
            f"{method}: batch_size 1: expected 2 or more for survival, because the loss compares "
            "the slides of a batch; 32 is a good start"
        )
    return settings


def _limit(settings: FinetuneSettings, task: SlideTask, part: str) -> int:
    """Returns the maximum number of tiles per slide of a part; 0 for no limit."""
    limits = [settings.max_tiles or task.max_tiles]
    if part == "train":
        limits.append(settings.bag_size)
    return min((limit for limit in limits if limit), default=0)


def _head(settings: FinetuneSettings, input_dim: int, num_classes: int) -> ClassificationHead:
    options = {
        "global_pool": settings.global_pool,
        "tile_size": settings.tile_size or CELL_PX,
        "max_wsi_size": settings.max_wsi_size,
        "dropout": settings.dropout,
        "drop_path_rate": settings.drop_path_rate,
        **settings.encoder,
    }
    head = ClassificationHead(
        input_dim,
        feat_layer=settings.feat_layer,
        n_classes=num_classes,
        model_arch=settings.model_arch,
        pretrained=settings.pretrained,
        freeze=settings.freeze,
        **options,
    )
    head.slide_encoder.set_grad_checkpointing(settings.grad_checkpointing)
    return head


def _untrained(cohort: Cohort, task: SlideTask) -> dict[str, list[str]]:
    """Returns, by fold, the classes that test slides have, but no training slide."""
    if task.is_survival:
        return {}

    def classes(slides: Sequence[str]) -> set[int]:
        labels = np.stack([cohort.labels[slide] for slide in slides])
        return {*np.flatnonzero(labels.any(axis=0))} if task.several_labels else {*labels.tolist()}

    found = {
        str(fold): [task.classes[k] for k in sorted(classes(split.test) - classes(split.train))]
        for fold, split in cohort.splits.items()
    }
    return {fold: names for fold, names in found.items() if names}


def _table(results: Mapping[str, Any], task: SlideTask) -> str:
    rows: list[tuple[Sequence[str], Mapping[str, Any]]] = []
    # The column of seeds is shown only if seeds were asked for.
    head = ["method", "fold"]
    if any("seed" in fold for found in results["methods"].values() for fold in found["folds"]):
        head.append("seed")
    for method, found in results["methods"].items():
        for fold in found["folds"]:
            cells = (method, str(fold["fold"]), str(fold.get("seed", "")))
            rows.append((cells[: len(head)], fold["test"]))
        if len(found["folds"]) > 1:
            rows.append(((method, "mean ± std", "")[: len(head)], found["mean"]))
    undefined: dict[int, dict[str, None]] = {}
    for found in results["methods"].values():
        for fold in found["folds"]:
            undefined.setdefault(fold["fold"], {}).update(dict.fromkeys(fold["test"]["undefined"]))
    listed = [f"fold {fold}: {', '.join(names)}" for fold, names in undefined.items() if names]
    notes = []
    if listed:
        notes.append(
            "Classes that no test slide or every test slide has, not counted in the means of AUROC "
            f"and AUPRC: {'; '.join(listed)}."
        )
    if results["untrained"]:
        listed = [f"fold {k}: {', '.join(names)}" for k, names in results["untrained"].items()]
        notes.append(
            "Classes of test slides that no training slide has, so that they could not be learned: "
            f"{'; '.join(listed)}."
        )
    if results["encoder"]:
        notes.append(f"Tile encoder of the features: {results['encoder']}.")
    if results["num_skipped"]:
        notes.append(f"{results['num_skipped']} slides or rows skipped: see skipped.jsonl.")
    if results["num_without_row"]:
        notes.append(f"{results['num_without_row']} files of features have no row in the table.")
    title = f"{task.name}: slides of {results['features']}"
    return results_table(title, task.setting, rows, head, notes)


def _write_summary(path: Path, results: Mapping[str, Any]) -> None:
    folds = [(name, fold) for name, found in results["methods"].items() for fold in found["folds"]]
    with_seed = any("seed" in fold for _, fold in folds)
    rows = []
    for method, fold in folds:
        row: dict[str, Any] = {"method": method, "fold": fold["fold"]}
        if with_seed:
            row["seed"] = fold.get("seed", "")
        for part in ("val", "test"):
            values = plain_values(fold.get(part) or fold["test"])
            shown = values if part in fold else dict.fromkeys(values)
            row |= {f"{part}_{name}": value for name, value in shown.items()}
        rows.append(row)
    write_csv(path, list(rows[0]), [list(row.values()) for row in rows])
