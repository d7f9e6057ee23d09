"""Reading checkpoints of every published form, safely and strictly.

`.pth` of MMEngine, DeepSpeed ZeRO-1/2 folders, `.bin`, safetensors and Hugging Face folders give
one flat `{name: tensor}`. Nothing is unpickled beyond tensors and a short list of harmless types.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]

ZERO_MODEL_FILE = "mp_rank_00_model_states.pt"
"""Where DeepSpeed ZeRO-1 and -2 keep the (unpartitioned) parameters, under the key `module`."""

_ZERO3_MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_HF_FILES = (
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_WRAPPER_KEYS = ("state_dict", "module", "model")
_SHOWN_NAMES = 20
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f]|\.\.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to the model it is loaded into."""


def load_state_dict_file(path: str | os.PathLike[str]) -> StateDict:
    """Reads the tensors of a checkpoint file or folder into one flat dictionary on the CPU.

    Args:
        path: `.pth`, `.pt`, `.bin` or `.safetensors` file; a DeepSpeed ZeRO-1/2 folder; or a
            Hugging Face folder, sharded or not, model or adapter.

    Raises:
        FileNotFoundError: Nothing lies at `path`.
        CheckpointError: The content is no checkpoint, or holds types that are not allowed.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _safetensors_load(path)
    return _unwrap(_torch_load(path), path)


def is_file_name(value: str) -> bool:
    """Whether a text names something in a folder itself, not elsewhere."""
    return value not in ("", "..") and Path(value).name == value


def check_plain(names: Iterable[object], source: str | os.PathLike[str]) -> None:
    """Refuses names that could lead a tool which files tensors by name to other places.

    Raises:
        CheckpointError: A name is no text, or holds a separator of paths or control characters.
    """
    for name in names:
        if not isinstance(name, str) or not name or _NOT_IN_NAMES.search(name):
            raise CheckpointError(
                f"{source}: holds a tensor under the name {str(name)[:80]!r}; words joined by dots "
                "expected, such as model.norm.weight. The file is damaged or made to do harm"
            )


def open_torch_file(path: str | os.PathLike[str]) -> StateDict:
    """Opens a `.pth`, `.pt` or `.bin` file as a map: its tensors are read when they are used.

    Raises:
        CheckpointError: The content is no checkpoint, or holds types that are not allowed.
    """
    path = Path(path)
    return _unwrap(_torch_load(path, mmap=zipfile.is_zipfile(path)), path)


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """Reads whatever a `.pth` or `.pt` file holds: tensors and a few harmless types, else refusal.

    Raises:
        CheckpointError: The content is no checkpoint, or holds types that are not allowed.
    """
    path = Path(path)
    return _torch_load(path, mmap=zipfile.is_zipfile(path))


def load_strict(
    module: nn.Module, state_dict: Mapping[str, Tensor], *, what: str, source: str = "checkpoint"
) -> None:
    """Copies a state dict into a module; names and shapes must agree completely.

    Args:
        module: Where the tensors go.
        state_dict: Names as in `module.state_dict()`.
        what: What is being loaded, for the error.
        source: Where the tensors come from, for the error.

    Raises:
        CheckpointError: Lists the missing, the unexpected and the misshapen names.
    """
    expected = module.state_dict()
    check_names(expected, state_dict, what=what, source=source)
    # assign replaces meta tensors, for which there is nothing to copy into.
    assign = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(dict(state_dict), strict=True, assign=assign)


def check_names(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, what: str, source: str
) -> None:
    """Compares names and shapes of two state dicts.

    Raises:
        CheckpointError: They differ.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name}: {tuple(found[name].shape)} found, {tuple(tensor.shape)} expected"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if not (missing or unexpected or misshapen):
        return
    parts = [
        f"{source} does not fit the {what}: {len(missing)} missing, {len(unexpected)} unexpected, "
        f"{len(misshapen)} of another shape (of {len(expected)} expected)"
    ]
    for title, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("other shape", misshapen),
    ):
        if names:
            more = f", ... {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            parts.append(f"  {title}: {', '.join(names[:_SHOWN_NAMES])}{more}")
    raise CheckpointError("\n".join(parts))


def _load_folder(folder: Path) -> StateDict:
    tag_file = folder / "latest"
    if tag_file.is_file() and not (folder / ZERO_MODEL_FILE).is_file():
        tag = tag_file.read_text().strip()
        if is_file_name(tag) and (folder / tag).is_dir():
            folder = folder / tag
    if (folder / ZERO_MODEL_FILE).is_file():
        file = folder / ZERO_MODEL_FILE
        return _unwrap(_torch_load(file), file)
    if (folder / _ZERO3_MODEL_FILE).is_file():
        raise CheckpointError(
            f"{folder}: a DeepSpeed ZeRO-3 folder, whose parameters are split over the ranks; "
            "gather it first with DeepSpeed's zero_to_fp32.py"
        )
    for name in _HF_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _load_shards(folder, index)
        if (folder / name).is_file():
            return load_state_dict_file(folder / name)
    raise CheckpointError(
        f"{folder}: no checkpoint in this folder; expected {ZERO_MODEL_FILE} (DeepSpeed) or one of "
        f"{', '.join(_HF_FILES)}"
    )


def _load_shards(folder: Path, index: Path) -> StateDict:
    try:
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
        shards = sorted(set(map(str, weight_map.values())))
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{index}: no index with a weight_map: {error}") from error
    state_dict: StateDict = {}
    for shard in shards:
        if not is_file_name(shard):
            raise CheckpointError(f"{index}: shard {shard!r} lies outside the folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: shard {shard!r} is missing")
        state_dict |= load_state_dict_file(folder / shard)
    absent = sorted(set(weight_map) - set(state_dict))
    if absent:
        raise CheckpointError(f"{index}: the shards lack {', '.join(absent[:_SHOWN_NAMES])}")
    return state_dict


def _safetensors_load(file: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as a checkpoint: {error}") from error
    check_plain(tensors, file)
    return tensors


def _torch_load(file: Path, *, mmap: bool = False) -> Any:
    try:
        with _allowing(safe_types()):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises a dozen types here; all mean the same to a user
        raise CheckpointError(f"{file}: cannot be read as a checkpoint: {error}") from error


@contextmanager
def _allowing(types: list[Any]) -> Iterator[None]:
    """As `torch.serialization.safe_globals`, which on leaving forgets what was allowed before."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _unwrap(loaded: Any, file: Path) -> StateDict:
    for key in _WRAPPER_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    tensors = (
        {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not tensors:
        found = sorted(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(f"{file}: holds no named tensors; found {found}")
    check_plain(tensors, file)
    return tensors


class _Opaque:
    """Takes the place of a class whose content nobody reads, so that it need not be imported."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def __setstate__(self, state: object) -> None:
        self.state = state


class _OpaqueDict(dict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        self.state = state


class _History(_Opaque):
    """MMEngine's log history refers to its four statistics by `getattr(HistoryBuffer, name)`."""

    mean = max = min = current = None


def _statistics_getattr(owner: object, name: str) -> object:
    """Takes the place of `builtins.getattr`: answers for MMEngine's four log statistics only."""
    is_history = owner is _History or (
        isinstance(owner, type) and f"{owner.__module__}.{owner.__qualname__}" == _HISTORY
    )
    if is_history and name in {"mean", "max", "min", "current"}:
        return getattr(owner, name)
    raise CheckpointError(f"getattr({owner!r}, {name!r}) is not allowed in a checkpoint")


def _empty_bytes() -> bytes:
    """Takes the place of `builtins.bytes`, by whose call pickle protocol 2 writes an empty array.

    Without arguments only: `bytes(10**12)` would fill the memory.
    """
    return b""


def numpy_safe_types() -> list[Any]:
    """The pieces of numpy arrays and scalars, as numpy 1 and 2 name them."""
    multiarray = importlib.import_module(
        "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
    )
    pieces: list[Any] = [np.ndarray, np.dtype, (_empty_bytes, "builtins.bytes")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        pieces.append((multiarray._reconstruct, f"{module}._reconstruct"))
        pieces.append((multiarray.scalar, f"{module}.scalar"))
    pieces += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return pieces


def safe_types(history_type: type = _History) -> list[Any]:
    """What a training checkpoint may hold besides tensors: for `torch.serialization`.

    Args:
        history_type: What to build for MMEngine's `HistoryBuffer`; the real class when a run is
            resumed, a stand-in when only the tensors are wanted.
    """
    stand_ins: Iterable[tuple[type, str]] = (
        (_OpaqueDict, "mmengine.config.config.ConfigDict"),
        (_Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
        (_Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
        # An IntEnum: the stage says how the optimizer files are cut, so its value is needed.
        (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
        (_Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
    )
    return [
        *numpy_safe_types(),
        (history_type, _HISTORY),
        (_statistics_getattr, "builtins.getattr"),
        *stand_ins,
    ]
