"""Trains PathGen-CLIP in stages with open_clip's own trainer; resumes, and exports each stage.

Each stage of a recipe writes `<stage>/` with the trainer's log, settings and checkpoints,
`open_clip/` and, where the architecture allows, `hf/`. The next stage starts from `open_clip/`. A
killed run continues from the last complete epoch.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathcore.files import StrPath, file_identity, folder_lock, write_json
from pathcore.rows import read_lines, write_rows
from pathgen.clip.export import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    ExportError,
    export_hugging_face,
    export_open_clip,
    model_config,
)
from pathgen.clip.recipe import Recipe, Stage, trainer_arguments
from pathgen.clip.shards import ShardSet, find_shards, prepare_shards

CHECKPOINT_NAME = (
    "epoch_latest.pt"  # open_clip's trainer writes this one under a temporary name and renames it
)
SKIPPED_NAME = "skipped.jsonl"

Start = Callable[[Sequence[str]], int]
"""Runs Python with arguments in the requested number of processes; returns the exit code."""

_EXPORT_PATIENCE_S = 1800.0  # for the export on the first machine
_STEP_MARK = "Train Epoch:"
_CHANGEABLE = {"workers", "log_every_n_steps", "report_to", "device", "save_frequency"}

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Raised if the trainer ends with a non-zero exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class StageResult:
    """Outcome of a stage.

    Attributes:
        name: Name of the stage.
        open_clip: Folder that open_clip loads.
        hugging_face: Folder that transformers loads, or None with the reason in `note`.
        note: Reason why a folder is missing.
        num_pairs: Number of training pairs.
        num_skipped: Number of pairs and shards that were skipped.
    """

    name: str
    open_clip: Path
    hugging_face: Path | None
    note: str
    num_pairs: int
    num_skipped: int


def start_here(arguments: Sequence[str]) -> int:
    """Starts one process of this interpreter, without a launcher."""
    return subprocess.run([sys.executable, *arguments], check=False).returncode


def train_clip(
    recipe: Recipe,
    out: StrPath,
    *,
    start: Start = start_here,
    num_processes: int = 1,
    num_packers: int = 1,
    device: str | None = None,
    seed: int = 0,
    is_first_machine: bool = True,
) -> list[StageResult]:
    """Trains all stages that are not finished yet.

    Args:
        recipe: Model, initial weights and stages.
        out: Output folder; gets one folder per stage.
        start: Function that starts the trainer; by default in one process.
        num_processes: Number of processes that `start` starts, on all machines together.
        num_packers: Number of processes that make shards from `pairs.jsonl`.
        device: `cuda` or `cpu`; by default the trainer's choice.
        seed: Seed of the order of pairs in shards; the trainer has its own option `seed`.
        is_first_machine: Whether this machine exports; the machines of a run share `out`.

    Raises:
        FileNotFoundError: If data are missing.
        ValueError: If the data are too small for the batch, or another recipe was started in the
            folder.
        FolderInUseError: If another run is training in the folder.
        TrainingError: If the trainer fails; its log says why.
    """
    if not is_first_machine:  # the machines share a folder, and the first one holds its lock
        return _train_stages(
            recipe, Path(out), start, num_processes, num_packers, device, seed, is_first=False
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    with folder_lock(Path(out) / ".lock", folder=out):
        return _train_stages(
            recipe, Path(out), start, num_processes, num_packers, device, seed, is_first=True
        )


def _train_stages(
    recipe: Recipe,
    out: Path,
    start: Start,
    num_processes: int,
    num_packers: int,
    device: str | None,
    seed: int,
    *,
    is_first: bool,
) -> list[StageResult]:
    results, pretrained = [], recipe.pretrained
    for stage in recipe.stages:
        folder = out / stage.name
        options = {**stage.options, **({"device": device} if device else {})}
        preprocessing = _preprocessing(recipe.model, pretrained, options)
        inputs = _inputs(recipe.model, pretrained, stage, options)
        result = _finished_stage(folder, inputs)
        if result is None:
            num_readers = num_processes * max(1, _parsed(options).workers)
            shards = prepare_shards(
                stage.data,
                folder / "data",
                image_folder=stage.images,
                num_readers=num_readers,
                num_processes=num_packers,
                seed=seed,
            )
            shards.check(_parsed(options).batch_size, num_readers)
            write_json(folder / "inputs.json", inputs)
            job = _job(recipe.model, pretrained, stage, options, preprocessing, shards, folder)
            _run_stage(stage, job, folder, start)
            if is_first:
                _export(recipe.model, stage, options, preprocessing, shards, folder, inputs)
            result = _await_result(folder, inputs)
        results.append(result)
        pretrained = str(result.open_clip.absolute() / WEIGHTS_NAME)
    return results


def _job(
    model: str,
    pretrained: str,
    stage: Stage,
    options: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    shards: ShardSet,
    folder: Path,
) -> dict[str, Any]:
    """Returns the job that `pathgen.clip.worker` reads."""
    model_file = _named_config(model, folder) if model.endswith(".json") else ""
    name = Path(model_file).stem if model_file else model
    arguments = [
        *trainer_arguments({**options, **_image_options(preprocessing)}),
        *("--model", name),
        *("--pretrained", pretrained),
        *("--dataset-type", "webdataset", "--train-data", shards.urls),
        *("--train-num-samples", str(options.get("train_num_samples") or shards.total)),
        *("--logs", str(folder.absolute().parent), "--name", folder.name),
        *("--resume", "latest", "--save-most-recent"),
    ]
    if stage.val is not None:
        val = prepare_shards(stage.val, folder / "val", image_folder=stage.images)
        arguments += ["--val-data", val.urls, "--val-num-samples", str(val.total)]
    return {
        "arguments": arguments,
        "model_file": model_file,
        "device": _parsed(options).device,
        "skipped": str(folder.absolute() / "skipped_in_training.jsonl"),
        "captions": {
            "shard": str(shards.paths[0].absolute()),
            "model": name,
            "context_length": _parsed(options).force_context_length,
            "cache_dir": _parsed(options).cache_dir,
        },
    }


def _run_stage(stage: Stage, job: Mapping[str, Any], folder: Path, start: Start) -> None:
    write_json(folder / "job.json", job)
    code = start(["-m", "pathgen.clip.worker", str(folder.absolute() / "job.json")])
    if code:
        raise TrainingError(
            f"stage {stage.name}: open_clip's trainer ended with exit code {code}; its log: "
            f"{folder / 'out.log'}",
            code,
        )


def _export(
    model: str,
    stage: Stage,
    options: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    shards: ShardSet,
    folder: Path,
    inputs: Mapping[str, Any],
) -> None:
    checkpoint = folder / "checkpoints" / CHECKPOINT_NAME
    if not checkpoint.is_file():
        raise TrainingError(f"stage {stage.name}: the trainer left no {checkpoint}", 1)
    # The trainer logs the first step of each epoch, and saves even if there was none.
    if not any(_STEP_MARK in log.read_text("utf-8", "replace") for log in folder.glob("out*")):
        skipped = _skipped_in_training(folder)
        raise TrainingError(
            f"stage {stage.name}: the trainer ran no step: it found no batch of usable pairs in "
            f"{stage.data}; " + (f"the first fault: {skipped[0]}" if skipped else "see out.log"),
            1,
        )
    config = model_config(model, options)
    ours = export_open_clip(
        checkpoint, folder / "open_clip", config=config, preprocessing=preprocessing
    )
    theirs, note = folder / "hf", ""
    try:
        export_hugging_face(ours, theirs)
    except ExportError as error:
        note = f"not exported for transformers: {error}"
        logger.warning("stage %s: %s", stage.name, note)
    skipped = [*shards.skipped, *_skipped_in_training(folder)]
    write_rows(folder / SKIPPED_NAME, skipped)
    record = {
        "inputs": inputs,
        "num_pairs": shards.total,
        "num_skipped": len(skipped),
        "note": note,
    }
    write_json(folder / "stage.json", record)


def _await_result(folder: Path, inputs: Mapping[str, Any]) -> StageResult:
    """Waits until the first machine has exported the stage, and returns the result."""
    deadline = time.monotonic() + _EXPORT_PATIENCE_S
    while (result := _finished_stage(folder, inputs)) is None:
        if time.monotonic() > deadline:
            raise TrainingError(f"{folder}: the first machine has not exported this stage", 1)
        time.sleep(1)
    return result


def _finished_stage(folder: Path, inputs: Mapping[str, Any]) -> StageResult | None:
    """Returns the stage's result, or None if the stage is not complete."""
    for name in ("stage.json", "inputs.json"):
        if not (folder / name).is_file():
            continue
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        found = record["inputs"] if name == "stage.json" else record
        now = json.loads(json.dumps(inputs))
        changed = sorted(k for k in {*found, *now} if not _is_same(found.get(k), now.get(k)))
        if changed:
            raise ValueError(
                f"{folder}: was started with other {', '.join(changed)}; name a new output "
                "folder, or remove this one"
            )
        if name == "stage.json":
            theirs = folder / "hf"
            return StageResult(
                folder.name,
                folder / "open_clip",
                theirs if theirs.is_dir() else None,
                record["note"],
                record["num_pairs"],
                record["num_skipped"],
            )
    return None


def _is_same(found: Any, now: Any) -> bool:
    """Compares an input with that of an earlier run."""
    if not isinstance(now, dict) or "files" not in now:
        return bool(found == now)
    # A finished stage does not need its data, which may be gone.
    return found["path"] == now["path"] and (not now["files"] or found["files"] == now["files"])


def _inputs(
    model: str, pretrained: str, stage: Stage, options: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "model": json.loads(Path(model).read_text("utf-8")) if model.endswith(".json") else model,
        "pretrained": _file_input(pretrained, [Path(pretrained)]),
        "data": _file_input(
            str(stage.data.absolute()),
            find_shards(stage.data) if stage.data.is_dir() else [stage.data],
        ),
        "images": str(stage.images.absolute()) if stage.images else "",
        "options": {k: v for k, v in sorted(options.items()) if k not in _CHANGEABLE},
    }


def _file_input(path: str, files: Sequence[Path]) -> dict[str, Any]:
    return {"path": path, "files": [file_identity(file) for file in files if file.is_file()]}


def _parsed(options: Mapping[str, Any]) -> Any:
    from open_clip_train.params import parse_args

    return parse_args(trainer_arguments(options))


def _named_config(model: str, folder: Path) -> str:
    """Copies an architecture of ours under a name that open_clip does not use."""
    content = json.loads(Path(model).read_text(encoding="utf-8"))
    target = folder.absolute() / f"own-{Path(model).stem}.json"
    write_json(target, content)
    return str(target)


def _preprocessing(model: str, pretrained: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns mean, standard deviation, interpolation and resize mode of the initial weights.

    Raises:
        ValueError: If the weights were trained with another activation than the model's, which the
            trainer does not notice.
    """
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, get_pretrained_cfg

    found: dict[str, Any] = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    beside = Path(pretrained).parent / CONFIG_NAME
    quick = model_config(model, options).get("quick_gelu", False)
    if pretrained and Path(pretrained).is_file():
        if beside.is_file():
            content = json.loads(beside.read_text(encoding="utf-8"))
            found |= content.get("preprocess_cfg", {})
            if content.get("model_cfg", {}).get("quick_gelu", False) != quick:
                raise ValueError(
                    f"pretrained {pretrained}: only one of {beside.name} and model {model} has "
                    "QuickGELU; use the model that the weights were trained with"
                )
    elif pretrained and not model.endswith(".json"):
        known = get_pretrained_cfg(model, pretrained)
        if known.get("quick_gelu") and not quick:
            raise ValueError(
                f"pretrained {pretrained}: was trained with QuickGELU, which model {model} lacks; "
                f"use {model}-quickgelu"
            )
        names = ("mean", "std", "interpolation", "resize_mode")
        found |= {name: known[name] for name in names if known.get(name)}
    for name in ("mean", "std", "interpolation", "resize_mode"):
        if options.get(f"image_{name}"):
            found[name] = options[f"image_{name}"]
    return {**found, "mean": list(found["mean"]), "std": list(found["std"])}


def _image_options(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    return {f"image_{name}": value for name, value in preprocessing.items()}


def _skipped_in_training(folder: Path) -> list[dict[str, Any]]:
    """Returns the samples that the pipeline skipped, each once over all epochs and processes."""
    file = folder / "skipped_in_training.jsonl"
    if not file.is_file():
        return []
    # A process that was killed may have left half a line.
    rows = [row for _, row in read_lines(file) if isinstance(row, dict)]
    return list({(row["shard"], row["id"]): row for row in rows}.values())
