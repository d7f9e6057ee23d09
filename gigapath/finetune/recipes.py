"""Recipes: YAML files with the settings of a probe or a fine-tuning.

A recipe names fields of a settings class, and may start from another recipe::

    _base_: panda.yml      # fields that are not set here come from there
    epochs: 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pathcore.files import StrPath
from pathcore.names import did_you_mean
from pathcore.recipes import read_recipes

Settings = TypeVar("Settings")

REPLACED = {
    "latent_dim": "the width follows from model_arch",
    "fp16": "write precision=bf16, which needs no loss scaling",
    "pat_strat": "write split_key=pat_id; patients in the table stay together by default",
    "report_to": "no such service is used; curves.png and history.json show the training",
    "exp_name": "name the run by its output folder",
    "save_dir": "give the output folder as --output",
    "output_dir": "give the output folder as --output",
    "root_path": "give the folder of features as the first argument",
    "input_path": "give the embeddings as the first argument",
    "dataset_csv": "give the table as --labels",
    "pre_split_dir": "give the folder of splits as --splits",
    "task_cfg_path": "give the task as --task",
    "task": "give the task as --task",
    "embed_dim": "give the width as --embed-dim (probe-tiles) or input_dim (finetune-slides)",
    "num_workers": "embeddings are read once, without worker processes",
}
"""Arguments of the published scripts without a setting of that name, and what replaces them."""


def read_yaml(path: StrPath) -> dict[str, Any]:
    """Reads a mapping from a YAML file, including the fields it inherits through `_base_`.

    Raises:
        FileNotFoundError: If the file or one that it inherits from does not exist.
        ValueError: If it is not YAML, not a mapping, or inherits from itself.
    """
    content: dict[str, Any] = {}
    for recipe in read_recipes(path):
        content |= recipe
    return content


def read_settings(
    kind: type[Settings],
    path: StrPath | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    others: tuple[str, ...] = (),
) -> Settings:
    """Reads settings from a recipe; options override it.

    Args:
        kind: A dataclass whose fields have defaults.
        path: The recipe; by default the defaults of `kind`.
        options: Values by field.
        others: Fields of the recipe that are not settings.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If a field is unknown or a value has the wrong type; names it.
    """
    where = f"recipe {path}" if path is not None else "settings"
    content = {k: v for k, v in (read_yaml(path) if path else {}).items() if k not in others}
    return make_settings(kind, {**content, **(options or {})}, where)


def make_settings(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Builds a dataclass of numbers, strings, flags and mappings, checking each field.

    Raises:
        ValueError: If a field is unknown or a value has the wrong type; names it.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(names)):
        replaced = REPLACED.get(unknown[0])
        hint = f"; {replaced}" if replaced else did_you_mean(unknown[0], names)
        raise ValueError(f"{where}: no field {unknown[0]!r}{hint}")
    try:
        return kind(**{n: _converted(n, v, hints[n]) for n, v in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _converted(name: str, value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-3 as a string
        except ValueError:
            raise ValueError(f"{name}: expected a number, found {value!r}") from None
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # feat_layer: 11
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ValueError(f"{name}: expected {hint.__name__}, found {value!r}")
    if hint not in (int, float, bool, str) and not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a mapping, found {value!r}")
    return value
