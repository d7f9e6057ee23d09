"""The way back: is this model that base with those adapters, and which adapter lies between two."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pallava.release.adapters import CONFIG_NAME
from pallava.release.merge_plan import Merger
from pallava.release.weights import WeightFolder
from pathcore.files import staged_files
from pathcore.weights import CheckpointError


@dataclass(frozen=True)
class MergeCheck:
    """How a merged model compares with base and adapters.

    Attributes:
        num_tensors: How many tensors were compared.
        num_equal: How many of them are equal bit for bit.
        worst: The tensor that is furthest off, in roundings of its type.
        roundings: How far; 1 is one unit in the last place.
    """

    num_tensors: int
    num_equal: int
    worst: str
    roundings: float


def check_merge(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    merged: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> MergeCheck:
    """Merges once more, without writing, and compares with a model that was merged before.

    Args:
        base: The base model's folder.
        adapters: The adapters, in their order.
        merged: A model folder, merged by whatever program.
        progress: Show a progress bar.

    Raises:
        CheckpointError: Other names or shapes.
    """
    merger, found = Merger(base, adapters), WeightFolder(merged)
    tensors = [tensor for shard in merger.plan().shards for tensor in shard]
    lacking = sorted({tensor.info.name for tensor in tensors} - set(found))
    if lacking:
        raise CheckpointError(f"{found.folder}: lacks {len(lacking)} tensors: {lacking[:5]}")
    equal, worst, roundings = 0, "", 0.0
    for tensor in tqdm(tensors, disable=not progress, desc="Comparing"):
        name = tensor.info.name
        if found.info(name).shape != tensor.info.shape:
            raise CheckpointError(
                f"{found.folder}: {name} is {found.info(name).shape}, {tensor.info.shape} expected"
            )
        start, distance = 0, 0.0
        for rows in merger.blocks(tensor):
            stop = start + len(rows) if rows.dim() else None
            distance = max(distance, _roundings(rows, found.read(name, start, stop)))
            start = stop or 0
        equal += distance == 0
        if distance > roundings:
            worst, roundings = name, distance
    return MergeCheck(len(tensors), equal, worst, roundings)


def extract_adapter(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int,
    progress: bool = True,
) -> float:
    """Writes the LoRA adapter that leads from one model to another, as well as a rank allows.

    The difference of each matrix is cut to its largest singular values (Eckart and Young, 1936);
    whatever is no matrix and differs goes into the adapter whole.

    Args:
        base: The base model's folder.
        tuned: A model of the same shapes.
        out: Receives an adapter that PEFT and `merge` read.
        rank: Rank of every matrix.
        progress: Show a progress bar.

    Returns:
        The largest part of a difference that the rank could not hold, between 0 and 1, as a ratio
        of Frobenius norms.

    Raises:
        CheckpointError: Models of different names or shapes.
        ValueError: A rank below 1.
    """
    from safetensors.torch import save_file

    if rank < 1:
        raise ValueError(f"rank {rank}: at least 1 expected")
    first, second = WeightFolder(base), WeightFolder(tuned)
    _check_same(first, second)
    tensors: dict[str, Tensor] = {}
    modules, saved, lost = [], [], 0.0
    for name in tqdm(sorted(first), disable=not progress, desc="Extracting"):
        before, after = first.read(name), second.read(name)
        if torch.equal(before, after):
            continue
        module = name.removesuffix(".weight")
        if before.dim() != 2 or "embed" in name or min(before.shape) < rank:
            tensors[f"base_model.model.{name}"] = after
            saved.append(module)
            continue
        a, b, missed = _low_rank(after.float() - before.float(), rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        modules.append(module)
        lost = max(lost, missed)
    if not tensors:
        raise CheckpointError(f"{tuned}: does not differ from {base}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules,
        "modules_to_save": saved or None,
        "inference_mode": True,
    }
    with staged_files(out, last="adapter_model.safetensors") as stage:
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, str(stage / "adapter_model.safetensors"), metadata={"format": "pt"})
    return lost


def _check_same(first: WeightFolder, second: WeightFolder) -> None:
    if set(first) != set(second):
        different = sorted(set(first) ^ set(second))
        raise CheckpointError(
            f"{second.folder} and {first.folder} differ in {len(different)} names: {different[:5]}"
        )
    for name in first:
        if first.info(name).shape != second.info(name).shape:
            raise CheckpointError(
                f"{name}: {second.info(name).shape} in {second.folder}, {first.info(name).shape} "
                f"in {first.folder}"
            )


def _low_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    root = values[:rank].sqrt()
    lost = float(values[rank:].norm() / values.norm())
    return root[:, None] * right[:rank], left[:, :rank] * root, lost


def _roundings(expected: Tensor, found: Tensor) -> float:
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    if not expected.numel():
        return 0.0
    limits = torch.finfo(
        found.dtype if found.dtype.itemsize < expected.dtype.itemsize else expected.dtype
    )
    expected, found = expected.double(), found.double()
    unit = torch.maximum(expected.abs(), found.abs()).clamp(min=limits.tiny) * limits.eps
    return float(((expected - found).abs() / unit).nan_to_num(float("inf")).max())
