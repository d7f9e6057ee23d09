"""The arithmetic of merging: what LoRA and DoRA add to a weight.

LoRA, arXiv:2106.09685: `W + s B A`. DoRA, arXiv:2402.09353, equation 5: `m (W + s B A) / norm`, the
norm taken over each output's inputs. Operations and their order are those of PEFT 0.21
(`peft/tuners/lora/layer.py`, `variants.py`), so that fp32 results are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pallava.release.adapters import Adapter, AdapterError, LoraPart, is_finite
from pallava.release.weights import TensorInfo


@dataclass
class LoadedPart:
    """One adapter's matrices for one layer, in memory."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None
    transposed: bool
    source: str

    def delta(self, start: int, stop: int | None) -> Tensor:
        """What LoRA adds to the rows `start:stop` of the weight, `(rows, columns)`."""
        if self.transposed:
            product = (self.b @ self.a[:, start:stop]).T
        else:
            product = self.b[start:stop] @ self.a
        return product.mul_(self.scaling)

    def add_to(self, rows: Tensor, start: int, stop: int | None) -> Tensor:
        """Adds the rows of the delta in one pass over the memory, in place."""
        if self.transposed:
            return rows.addmm_(self.a[:, start:stop].T, self.b.T, alpha=self.scaling)
        return rows.addmm_(self.b[start:stop], self.a, alpha=self.scaling)


def load_part(adapter: Adapter, part: LoraPart, info: TensorInfo, device: str) -> LoadedPart:
    """Reads the matrices of a layer and checks that they fit the base weight.

    Raises:
        AdapterError: They do not fit.
    """
    a = adapter.read(part.a_name).to(device)
    b = adapter.read(part.b_name).to(device)
    shape = (b.shape[0], a.shape[1])
    flipped = (shape[1], shape[0])
    if part.embedding:
        transposed, fits = True, info.shape == flipped
    else:
        # The flag is one for all layers; where only one of the two ways fits, the shape decides.
        transposed = part.transposed if info.shape == shape == flipped else info.shape != shape
        fits = info.shape in (shape, flipped)
    if not fits:
        raise AdapterError(
            f"{adapter.folder}: {info.name} is {info.shape} in the base model, but the adapter "
            f"was trained on {flipped if part.embedding else shape}; is it the right base model "
            f"({adapter.base_model or 'not named by the adapter'})?"
        )
    name = part.names.get("lora_magnitude_vector")
    magnitude = adapter.read(name).reshape(-1).to(device) if name else None
    if magnitude is not None and magnitude.numel() != shape[0]:
        raise AdapterError(
            f"{adapter.folder}: {name} has {magnitude.numel()} values, {shape[0]} expected"
        )
    return LoadedPart(a, b, part.scaling, magnitude, transposed, str(adapter.folder))


def needs_whole_weight(info: TensorInfo, parts: list[LoadedPart]) -> bool:
    """Whether a weight cannot be merged in blocks of rows.

    In fp32 it is computed whole, because the matrix product of a block may round differently; DoRA
    on a transposed weight needs the norm of whole columns.
    """
    half = info.dtype in (torch.float16, torch.bfloat16)
    return not half or any(part.transposed and part.magnitude is not None for part in parts)


def merge_rows(rows: Tensor, parts: list[LoadedPart], start: int, stop: int | None) -> Tensor:
    """Merges adapters, one after the other, into rows of a weight.

    Args:
        rows: The base weight's rows `start:stop`, of any floating-point type.
        parts: What each adapter adds; all on the device of `rows`.
        start: First row.
        stop: Behind the last row; None for the end.

    Returns:
        The merged rows in the type of `rows`, rounded once.

    Raises:
        AdapterError: The result does not fit the type.
    """
    half = rows.dtype in (torch.float16, torch.bfloat16)
    merged = rows.float() if half else rows.clone()
    keeps_base = len(parts) > 1 and any(part.magnitude is not None for part in parts)
    original = merged.clone() if keeps_base else merged
    for part in parts:
        if part.magnitude is not None:
            merged = _dora(part, original, merged, part.delta(start, stop), start, stop)
        elif half:
            merged = part.add_to(merged, start, stop)
        else:  # PEFT's operations: a fused one rounds differently
            merged = merged.add_(part.delta(start, stop))
    if not is_finite(merged, rows.dtype):
        raise AdapterError(
            f"{', '.join(part.source for part in parts)}: merging gives values that {rows.dtype} "
            "cannot hold; the adapter is damaged, or the base model needs a wider type"
        )
    return merged.to(rows.dtype)


def _dora(
    part: LoadedPart,
    original: Tensor,
    merged: Tensor,
    delta: Tensor,
    start: int,
    stop: int | None,
) -> Tensor:
    assert part.magnitude is not None
    outputs_last = part.transposed
    adapted = original.T + delta.T if outputs_last else original + delta
    norm = torch.linalg.norm(adapted, dim=1)
    magnitude = part.magnitude if outputs_last else part.magnitude[start:stop]
    factor = (magnitude / norm).view(-1, 1)
    return (factor.T if outputs_last else factor) * (merged + delta)
