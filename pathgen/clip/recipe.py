"""Recipes of CLIP training: YAML files that name a model, its initial weights and the stages.

A recipe is::

    _base_: other.yml            # optional: supplies the fields that are missing here
    model: ViT-L-14-quickgelu    # known to open_clip, or a JSON file beside the recipe
    pretrained: openai           # open_clip's tag or a checkpoint; random weights without it
    options: {precision: amp_bf16, workers: 8}   # of open_clip's trainer, for all stages
    stages:
      - {name: all, data: data/all/shards, options: {epochs: 10, lr: 1.0e-5}}
      - {name: clean, data: data/clean/pairs.jsonl, options: {epochs: 5}}

Each stage starts from the weights of the one before. Options are those of `python -m
open_clip_train.main --help`, with underscores.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathcore.files import StrPath, check_name
from pathcore.names import did_you_mean
from pathcore.recipes import read_recipes

SET_HERE = frozenset(
    {
        *("train_data", "dataset_type", "logs", "name", "resume"),
        *("save_most_recent", "model", "pretrained", "remote_sync", "copy_codebase"),
    }
)
"""Options that a recipe may not set, since training here sets them itself."""

_FIELDS = {"model", "pretrained", "options", "stages"}
_STAGE_FIELDS = {"name", "data", "images", "val", "options"}


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        name: Name of the stage and of its output folder.
        data: Shards or `pairs.jsonl`.
        images: Folder of the images of `pairs.jsonl`; by default the folder of that file.
        val: Shards or `pairs.jsonl` whose loss and recall are logged after each epoch.
        options: Options of open_clip's trainer.
    """

    name: str
    data: Path
    images: Path | None = None
    val: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A model, its initial weights and the stages of its training.

    Attributes:
        model: Name of an architecture of open_clip, or a JSON file that describes one.
        pretrained: A tag of open_clip, a checkpoint, or empty for random weights.
        stages: Stages, in the order in which they run.
    """

    model: str
    pretrained: str
    stages: tuple[Stage, ...]


def read_recipe(
    path: StrPath,
    *,
    data: Mapping[str, Path] | None = None,
    images: Path | None = None,
    options: Mapping[str, Any] | None = None,
    model: str | None = None,
    pretrained: str | None = None,
) -> Recipe:
    """Reads a recipe; the other arguments override its fields.

    Args:
        path: The YAML file.
        data: Stage -> shards or pairs.
        images: Folder of the images of all stages.
        options: Options of open_clip's trainer, for all stages.
        model: Model instead of the recipe's.
        pretrained: Initial weights instead of the recipe's.

    Raises:
        FileNotFoundError: If the recipe, or a model file or checkpoint that it names, is missing.
        ValueError: If a field or option is unknown.
    """
    path = Path(path)
    content: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for inherited in read_recipes(path):
        content |= inherited
        shared |= _mapping(path, "options", inherited.get("options"))
    if unknown := sorted(set(content) - _FIELDS):
        raise ValueError(
            f"recipe {path}: no field {unknown[0]!r}{did_you_mean(unknown[0], _FIELDS)}"
        )
    stages = content.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f"recipe {path}: stages: a list with at least one stage expected")
    data = dict(data or {})
    read = tuple(_stage(path, row, shared, data, images, options or {}) for row in stages)
    names = [stage.name for stage in read]
    if len(set(names)) != len(names):
        raise ValueError(f"recipe {path}: expected stages of different names, found {names}")
    if unknown := sorted(set(data) - set(names)):
        hint = did_you_mean(unknown[0], names)
        raise ValueError(f"recipe {path}: no stage {unknown[0]!r}{hint}")
    named = model or content.get("model")
    if not isinstance(named, str):
        raise ValueError(f"recipe {path}: model: expected a name or a JSON file, found {named!r}")
    start = content.get("pretrained") if pretrained is None else pretrained
    return Recipe(_model(path, named), _initial_weights(path, start or ""), read)


def trainer_arguments(options: Mapping[str, Any]) -> list[str]:
    """Returns options as command-line arguments of open_clip's trainer.

    True sets a flag, False and None omit it; lists and mappings become several values.

    Raises:
        ValueError: If the trainer does not know an option, or rejects its value.
    """
    from open_clip_train.params import parse_args

    known = vars(parse_args([]))  # exact names: argparse would also accept prefixes
    if unknown := sorted({name.replace("-", "_") for name in options} - set(known)):
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"options of open_clip's trainer: it has no {', '.join(unknown)}{hint}")
    arguments: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        arguments.append(flag)
        if isinstance(value, Mapping):
            arguments += [f"{key}={item}" for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            arguments += map(str, value)
        elif value is not True:
            arguments.append(str(value))
    _parse_trainer_arguments(arguments)
    return arguments


def _parse_trainer_arguments(arguments: list[str]) -> None:
    from open_clip_train.params import parse_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_args(arguments)
    except SystemExit as error:
        message = (said.getvalue().strip().splitlines() or ["refused"])[-1]
        raise ValueError(f"options of open_clip's trainer: {message}") from error


def _stage(
    path: Path,
    row: Any,
    shared: Mapping[str, Any],
    data: Mapping[str, Path],
    images: Path | None,
    options: Mapping[str, Any],
) -> Stage:
    row = _mapping(path, "stages", row)
    if unknown := sorted(set(row) - _STAGE_FIELDS):
        hint = did_you_mean(unknown[0], _STAGE_FIELDS)
        raise ValueError(f"recipe {path}: stages: no field {unknown[0]!r}{hint}")
    name = check_name(row.get("name"))
    source = data.get(name, row.get("data"))
    if source is None:
        raise ValueError(f"recipe {path}: stage {name}: expected data: shards or pairs.jsonl")
    merged = {**shared, **_mapping(path, "options", row.get("options")), **options}
    if taken := sorted(SET_HERE & set(merged)):
        raise ValueError(f"recipe {path}: stage {name}: {taken} are set by the training itself")
    if merged.get("train_num_samples") and not merged.get("dataset_resampled"):
        raise ValueError(
            f"recipe {path}: stage {name}: train_num_samples makes epochs of another length "
            "than the data; that needs dataset_resampled: true"
        )
    trainer_arguments(merged)
    folder = images if images is not None else row.get("images")
    val = Path(str(row["val"])) if row.get("val") else None
    return Stage(name, Path(str(source)), Path(str(folder)) if folder else None, val, merged)


def _model(path: Path, model: str) -> str:
    if not model.endswith(".json"):
        return model
    for file in (Path(model), path.parent / model):
        if file.is_file():
            return str(file.absolute())
    raise FileNotFoundError(f"recipe {path}: model {model}: no such file here or beside the recipe")


def _initial_weights(path: Path, pretrained: str) -> str:
    suffixes = (".pt", ".pth", ".bin", ".safetensors")
    if os.sep not in pretrained and not pretrained.endswith(suffixes):
        return pretrained
    if not Path(pretrained).exists():
        raise FileNotFoundError(f"recipe {path}: pretrained {pretrained}: no such checkpoint")
    if Path(pretrained).is_dir():
        found = Path(pretrained, "open_clip_model.safetensors")
        if not found.is_file():
            raise FileNotFoundError(
                f"recipe {path}: pretrained {pretrained}: no {found.name} in it"
            )
        return str(found.absolute())
    return str(Path(pretrained).absolute())


def _mapping(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"recipe {path}: {name}: expected a mapping, found {value!r:.80}")
    return {str(key): item for key, item in value.items()}
