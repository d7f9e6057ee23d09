"""Extracts a LoRA adapter from the difference of two models."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pallava.release.adapters import CONFIG_NAME
from pallava.release.weights import WeightFolder
from pathcore.files import StrPath, staged_files
from pathcore.weights import CheckpointError


def extract_adapter(
    base: StrPath,
    tuned: StrPath,
    out: StrPath,
    *,
    rank: int,
    progress: bool = True,
) -> float:
    """Writes the LoRA adapter of a given rank that best approximates the difference of two models.

    The difference of each matrix is truncated to its largest singular values (Eckart and Young,
    1936). Differing tensors that are not matrices are stored in full.

    Args:
        base: Folder of the base model.
        tuned: Folder of a model with the same shapes.
        out: Output folder for an adapter that PEFT and `merge` can read.
        rank: Rank of every matrix.
        progress: Whether to show a progress bar.

    Returns:
        The largest relative error among all matrices, between 0 and 1, as a ratio of Frobenius
        norms.

    Raises:
        CheckpointError: If the models differ in names or shapes.
        ValueError: If `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: expected at least 1")
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
