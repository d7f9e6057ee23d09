"""Gathers parameters from DeepSpeed ZeRO-1, -2 and -3 folders with `weights_only=True`.

The layout follows DeepSpeed's `deepspeed/utils/zero_to_fp32.py`: the optimizer file of each rank
holds its partition of flat fp32 groups, and the model file lists the parameters of each group in
order. Under ZeRO-1 and -2, the partitions of a group are concatenated; under ZeRO-3, each parameter
is partitioned over the ranks. DeepSpeed's own script unpickles arbitrary objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathcore.files import StrPath
from pathcore.weights import (
    ZERO_MODEL_FILE,
    CheckpointError,
    StateDict,
    is_file_name,
    read_state_dict,
    read_torch_file,
)

_OPTIMIZER_FILES = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_ZERO3_MODEL_FILES = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")


def load_checkpoint(path: StrPath, *, mmap: bool = False) -> StateDict:
    """Reads the trained tensors of a `.pth` file or of a DeepSpeed folder of any ZeRO stage.

    Parameters come from the optimizer's fp32 master weights if they are present, otherwise from the
    half-precision copy in the model file, which ZeRO-3 lacks.

    Args:
        path: `.pth` file, or folder `iter_N.pth` of a DeepSpeed run.
        mmap: Whether to map a file rather than to read it.

    Raises:
        FileNotFoundError: If `path` does not exist.
        CheckpointError: If files are damaged or incomplete, or contain disallowed types.
    """
    folder = Path(path)
    if not folder.is_dir():
        return read_state_dict(folder, mmap=mmap)
    tag_file = folder / "latest"
    if tag_file.is_file() and not _model_files(folder):
        tag = tag_file.read_text().strip()
        if is_file_name(tag):
            folder = folder / tag
            if not folder.is_dir():
                raise FileNotFoundError(f"{tag_file}: names {tag!r}, and there is no such folder")
    models = _model_files(folder)
    if not models:
        return read_state_dict(folder)
    optimizers = _ranked(folder, _OPTIMIZER_FILES)
    if not optimizers:
        if models[0].name == ZERO_MODEL_FILE:
            return read_state_dict(folder)
        raise CheckpointError(
            f"{folder}: a ZeRO-3 folder without *_optim_states.pt; its parameters are there"
        )
    return _gather(folder, models, optimizers)


def _gather(folder: Path, models: list[Path], optimizers: list[Path]) -> StateDict:
    state = _mapping(read_torch_file(models[0]), models[0])
    states = [
        _mapping(_mapping(read_torch_file(file), file).get("optimizer_state_dict"), file)
        for file in optimizers
    ]
    stage = states[0].get("zero_stage", 2)
    if stage not in (1, 2, 3):
        raise CheckpointError(f"{optimizers[0]}: zero_stage is {stage!r}; expected 1, 2 or 3")
    count = states[0].get("partition_count", len(states))
    expected = max(count) if isinstance(count, Sequence) else int(count)
    if expected != len(states):
        raise CheckpointError(
            f"{folder}: written by {expected} processes, but {len(states)} *_optim_states.pt lie "
            "there; copy all of them"
        )
    steps = {file: _steps(rank) for file, rank in zip(optimizers, states, strict=True)}
    if len({tuple(found) for found in steps.values() if found}) > 1:
        listed = ", ".join(f"{file.name}: {found}" for file, found in steps.items())
        raise CheckpointError(
            f"{folder}: its files are of different steps of the optimizer ({listed}); copy the "
            "whole folder again"
        )
    shapes = [dict(group) for group in state.get("param_shapes") or []]
    if not shapes:
        raise CheckpointError(f"{models[0]}: names no param_shapes; no ZeRO model file")
    if stage == 3:
        groups = [
            _tensors(s, "fp32_flat_groups", f) for s, f in zip(states, optimizers, strict=True)
        ]
        gathered = _gather_stage3(shapes, groups, folder)
    else:
        key = "single_partition_of_fp32_groups"
        groups = [_tensors(s, key, f) for s, f in zip(states, optimizers, strict=True)]
        gathered = _gather_stage2(shapes, groups, folder)
    return gathered | _buffers(state)


def _steps(state: Mapping[str, Any]) -> list[int]:
    """Returns the numbers of steps that the optimizer of a rank has made, without repetition."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
    parameters = base.get("state") if isinstance(base, Mapping) else None
    found = parameters.values() if isinstance(parameters, Mapping) else ()
    return sorted({int(p["step"]) for p in found if isinstance(p, Mapping) and "step" in p})


def _gather_stage2(
    shapes: list[dict[str, Any]], groups: list[list[Tensor]], folder: Path
) -> StateDict:
    gathered: StateDict = {}
    for index, group in enumerate(shapes):
        flat = torch.cat([rank[index].reshape(-1) for rank in groups])
        offset = 0
        for name, shape in group.items():
            numel = torch.Size(shape).numel()
            gathered[name] = _cut(flat, offset, numel, name, folder).view(torch.Size(shape)).clone()
            offset += numel
    return gathered


def _gather_stage3(
    shapes: list[dict[str, Any]], groups: list[list[Tensor]], folder: Path
) -> StateDict:
    flats = [torch.cat([group.reshape(-1) for group in rank]) for rank in groups]
    gathered: StateDict = {}
    offset = 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        numel = torch.Size(shape).numel()
        part = -(-numel // len(flats))  # the last rank's part is padded
        pieces = [_cut(flat, offset, part, name, folder) for flat in flats]
        gathered[name] = torch.cat(pieces)[:numel].view(torch.Size(shape))
        offset += part
    return gathered


def _cut(flat: Tensor, offset: int, numel: int, name: str, folder: Path) -> Tensor:
    if offset + numel > flat.numel():
        raise CheckpointError(
            f"{folder}: the optimizer's parts end inside {name}; a damaged folder"
        )
    return flat[offset : offset + numel]


def _buffers(state: Mapping[str, Any]) -> StateDict:
    module, names = state.get("module") or {}, set(state.get("buffer_names") or ())
    return {
        name: value
        for name, value in module.items()
        if isinstance(value, Tensor) and (name in names or not value.is_floating_point())
    }


def _tensors(state: Mapping[str, Any], key: str, file: Path) -> list[Tensor]:
    value = state.get(key)
    tensors = [value] if isinstance(value, Tensor) else list(value or [])
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise CheckpointError(f"{file}: no {key}; no ZeRO optimizer file")
    return tensors


def _mapping(value: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{file}: expected a dictionary, found {type(value).__name__}")
    return value


def _model_files(folder: Path) -> list[Path]:
    if (folder / ZERO_MODEL_FILE).is_file():
        return [folder / ZERO_MODEL_FILE]
    return _ranked(folder, _ZERO3_MODEL_FILES)


def _ranked(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = [(match, path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted((int(m.group(m.lastindex or 1)), p) for m, p in found)]
