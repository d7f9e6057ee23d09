"""Checks that an adapter was trained on a given base model.

The shapes of adapted layers cannot tell: they are the same in Llama 3, Llama 3 Instruct, Llama 3.1
and Mistral.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pallava.release.adapters import Adapter, AdapterError
from pallava.release.base_model import BaseModel
from pallava.release.weights import WeightFolder
from pathcore.weights import CheckpointError

BASE_NAME = "base_model.json"
"""File beside an adapter written by `pth-to-hf` that records the architecture of the base model."""

_COMPARED = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size"),
)
_SAMPLED_TENSORS = 8
_SAMPLED_ROWS = 16
_FORCE = "use the model that the adapter was trained on, or --force-base if you know that it is"


def check_trained_on(adapter: Adapter, base: BaseModel) -> None:
    """Rejects an adapter that was trained on another base model.

    Architecture and vocabulary are compared with the record of `pth-to-hf` and, if it can be found,
    with the model that the adapter names, including a sample of weight rows. If that model cannot
    be found, its name must equal that of the base.

    Raises:
        AdapterError: If the adapter was trained on another model.
    """
    recorded = _read_json(adapter.folder / BASE_NAME)
    if recorded:
        _compare(adapter, base, recorded, "was trained on a model")
    named = adapter.base_model
    if not named:
        return
    folder = find_model(named, adapter.config.get("revision"))
    if folder is not None:
        if folder.resolve() == base.folder.resolve():
            return
        _compare(adapter, base, describe_base(folder), f"was trained on {named}")
        if not _same_weights(folder, base):
            raise AdapterError(
                f"{adapter.folder}: was trained on {named}, whose weights are not those of "
                f"{base.folder}; {_FORCE}"
            )
        return
    names = {_last(str(base.folder.resolve())), _last(str(base.folder))}
    names.add(_last(str(base.config.get("_name_or_path") or "")))
    if not recorded and _last(named) not in names:
        raise AdapterError(
            f"{adapter.folder}: was trained on {named}, which is not to be found here, and "
            f"{base.folder} bears another name; {_FORCE}"
        )


def describe_base(folder: Path) -> dict[str, Any]:
    """Returns architecture and sizes from a model's config.json; empty without one."""
    from transformers import CONFIG_MAPPING

    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        # The config class fills in defaults that the file omits, under standard names.
        try:
            known = CONFIG_MAPPING[kind].from_dict(config)
        except Exception:  # an unsuitable config can raise any exception
            return config
        config = {name: getattr(known, name, None) for name in _COMPARED}
    return {name: config[name] for name in _COMPARED if config.get(name) is not None}


def find_model(name: str, revision: str | None = None) -> Path | None:
    """Returns the folder of a model from the local disk or the Hub cache; None if not found.

    Args:
        name: Folder, or name on the Hub.
        revision: Branch, tag or commit on the Hub; by default its main branch.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # the path of a folder that no longer exists
        return None
    return Path(config).parent if isinstance(config, str) else None


def _compare(adapter: Adapter, base: BaseModel, trained: dict[str, Any], what: str) -> None:
    found = describe_base(base.folder)
    different = [
        f"{name} {found[name]}, not {trained[name]}"
        for name in _COMPARED
        if name in found and name in trained and found[name] != trained[name]
    ]
    if different:
        raise AdapterError(
            f"{adapter.folder}: {what} of another architecture: {base.folder} has "
            f"{', '.join(different)}; {_FORCE}"
        )


def _same_weights(folder: Path, base: BaseModel) -> bool:
    """Returns whether two models agree in a sample of rows, rounded to the narrower dtype.

    A folder without weights agrees, since the Hub cache may hold only a config.
    """
    try:
        named = WeightFolder(folder)
    except FileNotFoundError:
        return True
    except CheckpointError:
        return False
    matrices = [n for n in sorted(base.weights) if len(base.weights.info(n).shape) == 2]
    for name in matrices[:: max(1, len(matrices) // _SAMPLED_TENSORS)]:
        if name not in named or named.info(name).shape != base.weights.info(name).shape:
            return False
        rows = min(_SAMPLED_ROWS, named.info(name).shape[0])
        pair = [weights.read(name, 0, rows) for weights in (named, base.weights)]
        narrow = min((t.dtype for t in pair), key=lambda dtype: dtype.itemsize)
        if not torch.equal(pair[0].to(narrow), pair[1].to(narrow)):
            return False
    return True


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].lower()
