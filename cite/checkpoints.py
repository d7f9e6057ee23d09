"""Weights from disk: read without running code, and loaded entirely or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathcore.files import atomic_file, read_json

_WRAPPERS = ("state_dict", "model", "teacher", "model_state_dict")
_SHOWN = 5


class CheckpointError(ValueError):
    """Weights that are damaged, or do not belong to the model."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint.

    Args:
        path: `.safetensors`, a file of `torch.save` (also inside `state_dict` or `model`, and with
            `module.` before the names), a TorchScript archive as OpenAI's CLIP is published, or a
            Hugging Face folder.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: It cannot be read, or holds no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    if path.is_dir():
        merged: dict[str, Tensor] = {}
        for file in _files_of(path):
            merged |= read_state_dict(file)
        return merged
    content = _read(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = (
        {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def write_state_dict(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor]) -> None:
    """Writes tensors as `.safetensors`, or as `state_dict` of a `.pth` or `.pt` file.

    Raises:
        ValueError: Another suffix.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{path}: a name that ends in .safetensors, .pth or .pt expected")
    with atomic_file(path) as partial:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, partial)
        else:
            torch.save({"state_dict": tensors}, partial)


def load_strict(
    module: nn.Module, state_dict: Mapping[str, Tensor], *, what: str, source: str
) -> None:
    """Loads weights of which every name and shape must fit.

    Args:
        module: Takes the weights.
        state_dict: The weights.
        what: What the module is, for the error.
        source: Where the weights come from.

    Raises:
        CheckpointError: Names or shapes differ; lists them.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(state_dict[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if missing or unexpected or shapes:
        found = (("missing", missing), ("unexpected", unexpected), ("of other shapes", shapes))
        parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in found if names]
        raise CheckpointError(
            f"{source}: these are not the weights of {what}: {'; '.join(parts)}. "
            f"The model has {len(own)} tensors, the checkpoint {len(state_dict)}: is it one of "
            "another architecture?"
        )
    module.load_state_dict(state_dict)


def only_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keeps the frozen encoder of a classifier's checkpoint; others stay as they are."""
    if not any(name.startswith("backbone.") for name in state_dict):
        return dict(state_dict)
    ours = ("backbone.prompt", "backbone.prompt_initialised")
    return {
        name.removeprefix("backbone."): tensor
        for name, tensor in state_dict.items()
        if name.startswith("backbone.") and name not in ours
    }


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        if _is_torchscript(path):
            return torch.jit.load(path, map_location="cpu").state_dict()
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as tensors alone: {reason}. Objects of other kinds are not "
            "loaded, since that would run their code; save its state dict as safetensors"
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["constants.pkl"] for name in archive.namelist())


def _files_of(folder: Path) -> list[Path]:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            weight_map = read_json(folder / index, what="index").get("weight_map", {})
            names = sorted({Path(str(name)).name for name in weight_map.values()})
            return [folder / name for name in names]
    for name in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")
