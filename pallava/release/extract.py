"""Extracts a LoRA adapter from the difference of two models."""

from __future__ import annotations

import json
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from pallava.release.adapters import CONFIG_NAME
from pallava.release.base_model import BaseModel
from pathcore.files import StrPath, staged_files
from pathcore.weights import CheckpointError

_PREFIX = "base_model.model."


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
    1936). Biases of linear layers are stored as trained biases, and other modules in full.

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
    first, second = BaseModel(base), BaseModel(tuned)
    _check_same(first, second)
    differences = {}
    for name in tqdm(sorted(first), disable=not progress, desc="Comparing"):
        if not torch.equal(first.read(name), second.read(name)):
            differences[name] = _way_to_store(first, name, rank)
    whole = sorted({_module(name) for name, way in differences.items() if way == "whole"})
    tensors: dict[str, Tensor] = {}
    adapted, lost = [], 0.0
    for name in tqdm(sorted(first), disable=not progress, desc="Extracting"):
        module = _module(name)
        # PEFT replaces a module with all its tensors and with the modules inside it.
        if any(f"{module}.".startswith(f"{parent}.") for parent in whole):
            tensors[_PREFIX + name] = second.read(name)
        elif differences.get(name) == "bias":
            is_adapted = differences.get(f"{module}.weight") == "matrix"
            layer = f"{module}.base_layer" if is_adapted else module
            tensors[f"{_PREFIX}{layer}.bias"] = second.read(name)
        elif name in differences:
            difference = second.read(name).float() - first.read(name).float()
            if first.stores_transposed(name):
                difference = difference.T
            a, b, missed = _low_rank(difference, rank)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
            adapted.append(module)
            lost = max(lost, missed)
    if not differences:
        raise CheckpointError(f"{tuned}: does not differ from {base}")
    if not adapted:
        raise CheckpointError(
            f"{tuned}: differs from {base} in {sorted(differences)[:5]}, but in no weight of a "
            f"linear layer with at least {rank} rows and columns; PEFT loads no adapter without "
            "such a layer: choose a lower rank, or use the tuned model itself"
        )
    if first.is_tied and first.input_embeddings in differences:
        # PEFT unties the module that it replaces, so that both sides are needed.
        tensors[f"{_PREFIX}{first.output_embeddings}"] = second.read(str(first.input_embeddings))
        whole.append(_module(str(first.output_embeddings)))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": adapted,
        "modules_to_save": whole or None,
        "bias": "all" if "bias" in differences.values() else "none",
        "inference_mode": True,
    }
    with staged_files(out, last="adapter_model.safetensors") as stage:
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, str(stage / "adapter_model.safetensors"), metadata={"format": "pt"})
    return lost


def _way_to_store(base: BaseModel, name: str, rank: int) -> Literal["matrix", "bias", "whole"]:
    """Returns as what PEFT reads a changed tensor: LoRA, trained bias, or module saved in full."""
    layer = base.model.get_submodule(_module(name)) if base.model is not None else None
    is_linear = isinstance(layer, nn.Linear | Conv1D) or (layer is None and "embed" not in name)
    if is_linear and name.endswith(".bias"):
        return "bias"
    shape = base.info(name).shape
    is_matrix = is_linear and name.endswith(".weight") and len(shape) == 2 and min(shape) >= rank
    return "matrix" if is_matrix else "whole"


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _check_same(first: BaseModel, second: BaseModel) -> None:
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
