"""Reads checkpoints without executing code in them, and loads them strictly.

`read_state_dict` reads the containers in which weights are published: safetensors, both formats of
`torch.save`, TorchScript (OpenAI's CLIP), Hugging Face folders with or without shards, and
DeepSpeed ZeRO-1/2 folders. `load_strict` copies tensors into a module and reports all that are
missing, unexpected or of a different shape.
"""

from __future__ import annotations

import importlib
import json
import re
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pathcore.files import StrPath, atomic_file

StateDict = dict[str, Tensor]

ZERO_MODEL_FILE = "mp_rank_00_model_states.pt"
"""File with the unpartitioned parameters of DeepSpeed ZeRO-1 and ZeRO-2, under the key `module`."""

_ZERO3_MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_FOLDER_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "adapter_model.bin",
)
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "teacher", "student")
"""Keys under which trainers store weights: MMEngine and Lightning, plain torch, MAE and timm,
DeepSpeed, DINO. `teacher` precedes `student`, because DINO evaluates its teacher. `model_ema` is
omitted on purpose: callers must choose between two sets of weights."""

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to every name."""

_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_SHOWN_NAMES = 20
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f]|\.\.")
_PAGE = "an HTML page, which servers send in place of a file that needs a login or a confirmation"
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer and not the weights themselves; run `git lfs pull`, or download the "
        "file from its page",
    ),
    (b"<!doctype html", f"{_PAGE}; download it with a browser"),
    (b"<html", f"{_PAGE}; download it with a browser"),
    (b"<?xml", "an XML document, often the error page of a storage server; download it again"),
    (b"\x89png", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"ii*\0", "a TIFF image"),
    (b"mm\0*", "a TIFF image"),
    (b"%pdf", "a PDF document"),
    (b"\x89hdf", "an HDF5 file, as Keras writes; convert it to PyTorch first"),
    (b"\x93numpy", "a single NumPy array"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"{", "JSON text; the weights are in another file"),
)


_FOLDER_FLAG = 0x10
"""Directory flag of MS-DOS in the attributes of a zip entry."""

_DAMAGED_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # unknown compression or version, for instance by a changed byte
    OverflowError,
    OSError,
    RuntimeError,  # an entry that is marked as encrypted
    struct.error,
    ValueError,
)
"""Exceptions that zipfile raises for damaged archives."""


class CheckpointError(ValueError):
    """Raised if a checkpoint cannot be read or does not fit the model."""


def read_state_dict(path: StrPath, *, mmap: bool = False) -> StateDict:
    """Reads the tensors of a checkpoint into a flat dictionary on the CPU.

    The format is recognised by content, not by suffix. Optimizer states, arguments and other
    entries are dropped, and the prefixes `module.` and `_orig_mod.` are removed.

    Args:
        path: A file, a Hugging Face folder (sharded or not, model or adapter), or a DeepSpeed
            ZeRO-1/2 folder.
        mmap: Whether to memory-map a `torch.save` file. The file must not change while the tensors
            are in use.

    Raises:
        FileNotFoundError: If `path` does not exist.
        CheckpointError: If it is not a checkpoint, or contains objects that are not allowed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "epoch_3.pth"
        >>> torch.save({"state_dict": {"module.fc.weight": torch.zeros(2, 3)}, "epoch": 3}, file)
        >>> {name: tuple(tensor.shape) for name, tensor in read_state_dict(file).items()}
        {'fc.weight': (2, 3)}
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, mmap)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file or folder")
    container = recognise_container(path)
    if container == "safetensors":
        return _read_safetensors(path)
    if container == "torchscript":
        # This only deserialises; methods in the archive are compiled but not called.
        tensors = dict(torch.jit.load(path, map_location="cpu").state_dict())
        check_plain(tensors, path)
        return tensors
    if container in ("zip", "deflated") and not mmap:
        _check_archive(path)
    # Archives that were repacked with compression cannot be memory-mapped: torch would interpret
    # the compressed bytes as values.
    return _unwrap(_torch_load(path, mmap=mmap and container == "zip"), path)


def read_torch_file(path: StrPath) -> Any:
    """Reads the whole content of a `torch.save` file: tensors and a few harmless types.

    Raises:
        CheckpointError: If it is not such a file, or contains objects that are not allowed.
    """
    path = Path(path)
    return _torch_load(path, mmap=recognise_container(path) == "zip")


def write_state_dict(path: StrPath, state_dict: Mapping[str, Tensor]) -> None:
    """Writes tensors to a `.safetensors` file, or under the key `state_dict` to `.pth` or `.pt`.

    Raises:
        ValueError: If `path` has another suffix.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{path}: expected a name that ends in .safetensors, .pth or .pt")
    # Safetensors refuses tensors that are not contiguous.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with atomic_file(path) as partial:
        if path.suffix == ".safetensors":
            save_file(tensors, partial)
        else:
            torch.save({"state_dict": tensors}, partial)


def load_strict(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    what: str,
    source: StrPath = "checkpoint",
    hint: Callable[[Mapping[str, Tensor]], str] | None = None,
) -> None:
    """Copies a state dict into a module; all names and shapes must match.

    Args:
        module: The module. Parameters on the meta device are replaced.
        state_dict: Tensors with the names of `module.state_dict()`.
        what: Description of the module, for error messages.
        source: Origin of the tensors, for error messages.
        hint: Function that maps `state_dict` to advice for the error message, for example which
            architecture the tensors belong to.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of a different shape. The module is
            unchanged then.

    Example:
        >>> weights = {"weight": torch.zeros(2, 4)}
        >>> load_strict(nn.Linear(3, 2), weights, what="classifier")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        pathcore.weights.CheckpointError: checkpoint does not fit the classifier: 1 missing, ...
    """
    expected = module.state_dict()
    check_names(expected, state_dict, what=what, source=source, hint=hint)
    # Tensors on the meta device have no memory to copy into.
    assign = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(dict(state_dict), strict=True, assign=assign)


def check_names(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    what: str,
    source: StrPath,
    hint: Callable[[Mapping[str, Tensor]], str] | None = None,
) -> None:
    """Compares the names and shapes of two state dicts.

    Raises:
        CheckpointError: If they differ. The message lists tensors that are missing, unexpected or
            of a different shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name}: {tuple(found[name].shape)} found, {tuple(tensor.shape)} expected"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    advice = hint(found) if hint is not None and (missing or unexpected or misshapen) else ""
    _raise_if_any(
        missing,
        unexpected,
        misshapen,
        f"{source} does not fit the {what}",
        f" (of {len(expected)} expected)",
        advice,
    )


def check_finite(state_dict: Mapping[str, Tensor], source: StrPath) -> None:
    """Checks that all weights are finite.

    Raises:
        CheckpointError: If a tensor has NaN or infinite values. The message names it.
    """
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds values that are not finite")


def check_loading_report(
    report: Mapping[str, Any],
    module: nn.Module,
    *,
    what: str,
    source: StrPath,
    unused: Callable[[str], bool] = lambda name: False,
) -> None:
    """Checks the info returned by transformers' `from_pretrained(..., output_loading_info=True)`.

    transformers initialises missing tensors at random and only logs a warning. Unexpected tensors
    are harmless if they belong to a head that the module does not have, as in a BERT for masked
    language modelling, but not if they belong to a part that it has, such as further layers.

    Args:
        report: The loading info.
        module: The loaded module.
        what: Description of the module, for error messages.
        source: Origin of the weights, for error messages.
        unused: Function that returns whether a tensor of this name can be ignored.

    Raises:
        CheckpointError: If tensors were missing, unexpected or of a different shape.
    """
    own_parts = {name for name, _ in module.named_children()}
    base = f"{getattr(module, 'base_model_prefix', '')}."
    missing = sorted(name for name in report.get("missing_keys", ()) if not unused(name))
    unexpected = sorted(
        name
        for name in report.get("unexpected_keys", ())
        if name.removeprefix(base).split(".")[0] in own_parts
        and not (unused(name) or name.endswith(".position_ids"))  # stored by older versions
    )
    # Depending on the version of transformers, an entry is a name or a name with both shapes.
    misshapen = [
        entry
        if isinstance(entry, str)
        else f"{entry[0]}: {tuple(entry[1])} found, {tuple(entry[2])} expected"
        for entry in report.get("mismatched_keys", ())
    ]
    _raise_if_any(missing, unexpected, misshapen, f"{source} does not fit the {what}")


def _raise_if_any(
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
    title: str,
    ending: str = "",
    advice: str = "",
) -> None:
    if not (missing or unexpected or misshapen):
        return
    lines = [
        f"{title}: {len(missing)} missing, {len(unexpected)} unexpected, {len(misshapen)} of "
        f"another shape{ending}"
    ]
    for kind, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("other shape", misshapen),
    ):
        if names:
            lines.append(f"  {kind}: {shorten(names)}")
    if advice:
        lines.append(f"  {advice}")
    raise CheckpointError("\n".join(lines))


def strip_prefix_to_fit(
    state_dict: Mapping[str, Tensor],
    expected: Iterable[str],
    prefixes: Iterable[str] | None = None,
) -> StateDict:
    """Extracts the part of a larger model whose names fit best, and removes its prefix.

    For example, a DINO teacher stores its encoder as `backbone.*` beside `head.*`, and
    sentence-transformers stores a BERT as `0.auto_model.*`. Tensors without the prefix are dropped.
    If two prefixes fit equally well, such as the towers of a CLIP, the tensors are returned
    unchanged, since choosing one would be a guess.

    Args:
        state_dict: The checkpoint.
        expected: Names of the tensors of the model to load into.
        prefixes: Candidates, of which the first wins a tie; by default any prefix.

    Example:
        >>> checkpoint = {"backbone.norm.weight": torch.ones(4), "head.weight": torch.ones(4)}
        >>> list(strip_prefix_to_fit(checkpoint, ["norm.weight"]))
        ['norm.weight']
    """
    wanted = set(expected)
    counts: Counter[str] = Counter()
    for name in state_dict:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                counts[".".join([*parts[:start], ""])] += 1
    if prefixes is not None:
        prefix = max(("", *prefixes), key=lambda candidate: counts[candidate])
    else:
        best = counts.most_common(2)
        is_clear = len(best) == 1 or (len(best) > 1 and best[0][1] > best[1][1])
        prefix = best[0][0] if is_clear else ""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }


def shorten(names: Iterable[str]) -> str:
    """Joins names with commas; shortens lists of more than 20 names."""
    names = list(names)
    more = f", ... {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"{', '.join(names[:_SHOWN_NAMES])}{more}"


def is_file_name(value: str) -> bool:
    """Returns whether a string is the name of an entry of a folder, not a path."""
    return value not in ("", ".", "..") and Path(value).name == value


def check_plain(names: Iterable[object], source: StrPath) -> None:
    """Checks that tensor names are safe for tools that write one file per tensor.

    Raises:
        CheckpointError: If a name is not a string, or contains `..`, path separators or control
            characters.
    """
    for name in names:
        if not isinstance(name, str) or not name or _NOT_IN_NAMES.search(name):
            raise CheckpointError(
                f"{source}: holds a tensor under the name {str(name)[:80]!r}; words joined by dots "
                "expected, such as model.norm.weight. The file is damaged or malicious"
            )


def read_shard_index(index: Path) -> dict[str, Path]:
    """Reads a Hugging Face index of shards.

    Args:
        index: `model.safetensors.index.json` or `pytorch_model.bin.index.json`.

    Returns:
        The file of each tensor, by name.

    Raises:
        CheckpointError: If the index is damaged, or a shard is missing or outside the folder.
    """
    try:
        weight_map = {
            str(k): str(v) for k, v in json.loads(index.read_bytes())["weight_map"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: no index with a weight_map: {error}") from error
    for shard in sorted(set(weight_map.values())):
        if not is_file_name(shard):
            raise CheckpointError(f"{index}: shard {shard!r} is outside the folder")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: shard {shard!r} is missing")
    return {name: index.parent / shard for name, shard in weight_map.items()}


def _read_folder(folder: Path, mmap: bool) -> StateDict:
    if (folder / "saved_model.pb").is_file():
        raise CheckpointError(
            f"{folder}: a SavedModel of TensorFlow, as REMEDIS is published; convert its variables "
            "to PyTorch first, under timm's names of resnetv2_50x1_bit or resnetv2_152x2_bit"
        )
    tag_file = folder / "latest"
    if tag_file.is_file() and not (folder / ZERO_MODEL_FILE).is_file():
        tag = tag_file.read_text().strip()
        if is_file_name(tag) and (folder / tag).is_dir():
            folder = folder / tag
    if (folder / ZERO_MODEL_FILE).is_file():
        return read_state_dict(folder / ZERO_MODEL_FILE, mmap=mmap)
    if (folder / _ZERO3_MODEL_FILE).is_file():
        raise CheckpointError(
            f"{folder}: a DeepSpeed ZeRO-3 folder, whose parameters are split over the ranks; "
            "gather it first with DeepSpeed's zero_to_fp32.py"
        )
    for name in _FOLDER_FILES:
        # As in transformers, whose `save_pretrained` leaves the index of earlier shards behind.
        if (folder / name).is_file():
            return read_state_dict(folder / name, mmap=mmap)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, mmap)
    raise CheckpointError(
        f"{folder}: no checkpoint in this folder; expected {ZERO_MODEL_FILE} (DeepSpeed) or one of "
        f"{', '.join(_FOLDER_FILES)}"
    )


def _read_shards(index: Path, mmap: bool) -> StateDict:
    files = read_shard_index(index)
    state_dict: StateDict = {}
    for shard in sorted(set(files.values())):
        # A shard that an earlier save left behind may hold a tensor that is elsewhere now.
        found = read_state_dict(shard, mmap=mmap)
        state_dict |= {name: t for name, t in found.items() if files.get(name, shard) == shard}
    if absent := sorted(set(files) - set(state_dict)):
        raise CheckpointError(f"{index}: the shards lack {shorten(absent)}")
    return state_dict


def recognise_container(file: Path) -> str:
    """Recognises the format of a checkpoint by content, not by suffix.

    Returns:
        `safetensors`, `zip`, `deflated` (a zip with compression), `torchscript`, or `pickle` (torch
        before 1.6, and anything unknown).

    Raises:
        CheckpointError: If the file is empty or of a known other format, such as HTML.
    """

    def refuse(found: str) -> CheckpointError:
        return CheckpointError(f"{file}: cannot be read as a checkpoint: it is {found}")

    with open(file, "rb") as opened:
        head = opened.read(64)
    if not head:
        raise refuse("empty")
    if head.startswith(b"PK\x03\x04"):
        return _recognise_archive(file)
    header_bytes = int.from_bytes(head[:8], "little")
    # A safetensors file begins with the length of its JSON header.
    if head[8:9] == b"{" and 2 <= header_bytes <= file.stat().st_size - 8:
        return "safetensors"
    for start, found in _FOREIGN:
        if head.lstrip().lower().startswith(start):
            raise refuse(found)
    return "pickle" if head[:1] == b"\x80" or file.suffix != ".safetensors" else "safetensors"


def _recognise_archive(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            deflated = any(entry.compress_type for entry in archive.infolist())
            # For entries marked as folders torch reads nothing and returns uninitialised memory.
            folders = [e.filename for e in archive.infolist() if e.external_attr & _FOLDER_FLAG]
    except _DAMAGED_ARCHIVE as error:
        raise _damaged(file, error) from error
    if folders and any(not name.endswith("/") for name in folders):
        raise _damaged(file, f"{folders[0]} is marked as a folder")
    # TorchScript archives also contain data.pkl, but only they contain constants.pkl.
    if any(name.split("/")[1:2] == ["constants.pkl"] for name in names):
        return "torchscript"
    if any(name.split("/")[-1] == "data.pkl" for name in names):
        return "deflated" if deflated else "zip"
    found = "a zip archive without tensors; unpack it first"
    if names and all(name.endswith(".npy") for name in names):
        found = (
            "an archive of NumPy arrays, as JAX models are published. timm reads those of its "
            "ViTs: timm.create_model(NAME, checkpoint_path=FILE); save its state_dict"
        )
    raise CheckpointError(f"{file}: cannot be read as a checkpoint: it is {found}")


def _check_archive(file: Path) -> None:
    """Verifies the checksums of an archive, which torch ignores."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except _DAMAGED_ARCHIVE as error:
        raise _damaged(file, error) from error
    if bad is not None:
        raise _damaged(file, f"{bad} differs from its checksum")


def _damaged(file: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{file}: cannot be read as a checkpoint: {reason}; is the download complete?"
    )


def _read_safetensors(file: Path) -> StateDict:
    try:
        tensors = load_file(str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as a checkpoint: {error}") from error
    check_plain(tensors, file)
    return tensors


def _torch_load(file: Path, *, mmap: bool) -> Any:
    try:
        with _allowing(safe_types()):
            if mmap and file.suffix != ".safetensors":
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            with open(file, "rb") as opened:  # for a path, torch.load would go by the suffix
                return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, all of which mean the same to a user
        reason = str(error) or type(error).__name__
        refused = re.search(r"GLOBAL ([\w.]+) was not an allowed", reason)
        if refused is not None:
            reason = (
                f"it holds a {refused[1]}. Objects other than tensors are not loaded, because "
                "that would run code; save the model's state_dict as safetensors"
            )
        raise CheckpointError(f"{file}: cannot be read as a checkpoint: {reason}") from error


@contextmanager
def _allowing(types: list[Any]) -> Iterator[None]:
    """Allows types for unpickling within a context, and keeps those that were allowed before.

    `torch.serialization.safe_globals` forgets the latter when it ends.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _unwrap(loaded: Any, file: Path) -> StateDict:
    # Wrappers may be nested. DINOv2 stores {"teacher": {...}}, Lightning {"state_dict": {...}}.
    for _ in range(len(_WRAPPERS)):
        if not isinstance(loaded, Mapping):
            break
        key = next((k for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if key is None:
            break
        loaded = loaded[key]
    tensors = (
        {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not tensors:
        found = sorted(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(f"{file}: holds no named tensors; found {found}")
    check_plain(tensors, file)
    for prefix in _WRAPPER_PREFIXES:
        if all(name.startswith(prefix) and name != prefix for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


class _Opaque:
    """Stand-in for classes whose content is not used, so that they are not imported."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def __setstate__(self, state: object) -> None:
        self.state = state


class _PlainDict:
    """Stand-in for dict classes; torch's unpickler sets items only in dict and OrderedDict."""

    def __new__(cls, *args: object, **kwargs: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        del args, kwargs  # the factory of a defaultdict, the entries of a ConfigDict
        return OrderedDict()


class _History(_Opaque):
    """Stand-in for MMEngine's log history, whose pickle looks up four statistics by `getattr`."""

    mean = max = min = current = None


class _ZeroStage(int):
    """Stand-in for DeepSpeed's enum of stages, whose value says how optimizer states are divided.

    Python 3.11.0 to 3.11.3 pickle a member as `getattr` of its name, others by its value.
    """

    disabled, optimizer_states, gradients, weights, max_stage = 0, 1, 2, 3, 3


def _named_getattr(owner: object, name: str) -> object:
    """Stand-in for `builtins.getattr` that only supports MMEngine's log statistics and ZeRO stages.

    The real `getattr` would let a pickle reach arbitrary functions.
    """
    is_history = owner is _History or (
        isinstance(owner, type) and f"{owner.__module__}.{owner.__qualname__}" == _HISTORY
    )
    if is_history and name in {"mean", "max", "min", "current"}:
        return getattr(owner, name)
    if owner is _ZeroStage and not name.startswith("_") and name in vars(_ZeroStage):
        return getattr(owner, name)
    raise CheckpointError(f"getattr({owner!r}, {name!r}) is not allowed in a checkpoint")


def _empty_bytes() -> bytes:
    """Stand-in for `builtins.bytes`, which pickle protocol 2 calls for empty arrays.

    It takes no arguments, because `bytes(10**12)` would exhaust the memory.
    """
    return b""


def numpy_safe_types() -> list[Any]:
    """Returns the types in pickles of numpy arrays and scalars, with names of numpy 1 and 2."""
    multiarray = importlib.import_module(
        "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
    )
    pieces: list[Any] = [np.ndarray, np.dtype, (_empty_bytes, "builtins.bytes")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        pieces.append((multiarray._reconstruct, f"{module}._reconstruct"))
        pieces.append((multiarray.scalar, f"{module}.scalar"))
    pieces += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return pieces


_SETTINGS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
)
"""Classes of settings that training scripts store with the weights; MAE, RETFound, HIPT and DINO
store an `argparse.Namespace`. They are replaced by stand-ins, never imported or called."""

_SETTINGS_DICTS = (
    "collections.defaultdict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
)


def safe_types(history_type: type = _History) -> list[Any]:
    """Returns the types that a checkpoint may contain besides tensors, for `torch.serialization`.

    Args:
        history_type: Class for MMEngine's `HistoryBuffer`: the real one to resume a run, or a
            stand-in to read tensors only.
    """
    return [
        *numpy_safe_types(),
        (history_type, _HISTORY),
        (_named_getattr, "builtins.getattr"),
        *(dict, list, int, float, str, bool),  # factories of a defaultdict, types of a field
        (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
        *((_Opaque, name) for name in _SETTINGS),
        *((_PlainDict, name) for name in _SETTINGS_DICTS),
    ]
