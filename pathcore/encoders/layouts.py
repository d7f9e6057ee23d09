"""Renames the tensors of published vision encoders to those of timm's networks.

Checkpoints contain more than the encoder: MAE's decoder, DINO's head, a classifier. `fit_layout`
extracts the encoder, renames tensors that the training code named differently, and reports what it
dropped. It never adds tensors, so that strict loading still finds missing ones.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathcore.weights import StateDict, shorten, strip_prefix_to_fit

TRAINING_ONLY = (
    "decoder_",  # MAE's decoder: embed, blocks, norm, pred, pos_embed
    "mask_token",  # MAE's decoder input, DINOv2's and iBOT's masked patches
    "head.",
    "head_dist.",
    "fc.",
    "classifier.",
    "dino_head.",
    "ibot_head.",
    "dino_loss.",
    "ibot_patch_loss.",
    "momentum_encoder.",  # MoCo v3
    "base_encoder.",
    "predictor.",
    "projector.",
    "queue",
)
"""Prefixes of tensors that only training uses; dropped unless the network has such a tensor."""

_OTHER_TOWER = ("text.", "text_model.", "text_projection", "logit_scale", "logit_bias")
"""Prefixes of the other tensors in the checkpoint of a two-tower model."""

_RECOMPUTED = ("relative_position_index", "attn_mask", "relative_coords_table")
"""Suffixes of buffers that depend on the image size and are computed by the constructor."""

_CHUNKED_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
"""Name of a block in DINOv2's FSDP training, which groups blocks in chunks; the second number is
the index of the block across chunks."""

_PREFIXES = (
    "backbone.",
    "encoder.",
    "base_encoder.",
    "image_encoder.",
    "vision_model.",
    "trunk.",
    "visual.",
    "vit.",
    "model.",
)


@dataclass(frozen=True)
class FittedLayout:
    """Weights under the names of a network.

    Attributes:
        state_dict: Tensors to load strictly.
        dropped: Names in the file that the network does not use.
    """

    state_dict: StateDict
    dropped: tuple[str, ...]

    def describe(self) -> str:
        """Returns a phrase that says what was dropped, or an empty string."""
        if not self.dropped:
            return ""
        kinds = sorted({name.split(".")[0] for name in self.dropped})
        return f"{len(self.dropped)} tensors that it has no use for ({shorten(kinds)})"


def fit_layout(state_dict: Mapping[str, Tensor], model: nn.Module) -> FittedLayout:
    """Renames the tensors of a published checkpoint to those of a model of timm.

    Handles wrapper prefixes, DINOv2's chunked blocks, register tokens and SwiGLU names, MAE's
    decoder, and names of LayerScale in older transformers. timm's own filter for the architecture
    handles what it knows, such as Swin before timm 0.9 and position embeddings of another image
    size.

    Args:
        state_dict: Tensors, as `pathcore.weights.read_state_dict` returns them.
        model: The network, on any device; only its names and shapes are read.

    Example:
        >>> model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
        >>> checkpoint = {
        ...     "backbone.norm.weight": torch.ones(4), "backbone.norm.bias": torch.zeros(4),
        ...     "dino_head.weight": torch.ones(4),
        ... }
        >>> fitted = fit_layout(checkpoint, model)
        >>> sorted(fitted.state_dict), fitted.dropped
        (['norm.bias', 'norm.weight'], ('dino_head.weight',))
    """
    expected = model.state_dict()
    found = {unchunk_block(name): t for name, t in state_dict.items()}
    for _ in range(3):  # prefixes may be nested, as in `module.backbone.`
        stripped = strip_prefix_to_fit(found, _aliases(expected), _PREFIXES)
        if len(stripped) == len(found) and set(stripped) == set(found):
            break
        found = stripped
    dropped = tuple(
        name
        for name in found
        if name not in expected
        and (name.startswith((*TRAINING_ONLY, *_OTHER_TOWER)) or name.endswith(_RECOMPUTED))
    )
    # timm's filter recognises DINOv2 by its mask token, which is therefore dropped afterwards.
    kept = {name: t for name, t in found.items() if name not in dropped or name == "mask_token"}
    fitted = _timm_filter(model)(_layer_scale(kept, expected), model)
    fitted.pop("mask_token", None)
    taken = {id(tensor) for tensor in found.values()}
    outside = tuple(name for name, tensor in state_dict.items() if id(tensor) not in taken)
    return FittedLayout(fitted, (*outside, *dropped))


def unchunk_block(name: str) -> str:
    """Removes the chunk number from the name of a block of DINOv2's FSDP training.

    Example:
        >>> unchunk_block("blocks.1.13.norm1.weight")
        'blocks.13.norm1.weight'
    """
    return _CHUNKED_BLOCK.sub(r"\1blocks.\2.", name)


def pools_patches(state_dict: Mapping[str, Tensor]) -> bool:
    """Returns whether weights were fine-tuned on the mean of the patch tokens (MAE's `fc_norm`).

    Such a checkpoint has no `norm.*`: the class token was never normalised and must not be used.
    """
    outer = {name for name in state_dict if "blocks." not in name and "layers." not in name}
    return any(name.endswith("fc_norm.weight") for name in outer) and not any(
        name == "norm.weight" or name.endswith(".norm.weight") for name in outer
    )


def resize_positions(positions: Tensor, num_positions: int, num_prefix: int) -> Tensor:
    """Interpolates position embeddings from one square grid to another (bicubic).

    Args:
        positions: `(..., num_prefix + side**2, D)`.
        num_positions: Number of embeddings to return, including the prefix.
        num_prefix: Number of leading embeddings that are kept unchanged.

    Returns:
        `(..., num_positions, D)`.

    Raises:
        ValueError: If one of the two grids is not square.

    Example:
        >>> resize_positions(torch.zeros(1, 1 + 14**2, 32), 1 + 16**2, num_prefix=1).shape
        torch.Size([1, 257, 32])
    """
    found, wanted = positions.shape[-2] - num_prefix, num_positions - num_prefix
    sides = [round(max(n, 0) ** 0.5) for n in (found, wanted)]
    if [side**2 for side in sides] != [found, wanted] or not min(sides):
        raise ValueError(
            f"position embeddings: cannot fit {found} positions to {wanted}, both must be squares"
        )
    prefix, grid = positions[..., :num_prefix, :], positions[..., num_prefix:, :]
    grid = grid.reshape(1, sides[0], sides[0], -1).permute(0, 3, 1, 2).float()
    grid = nn.functional.interpolate(
        grid, size=(sides[1], sides[1]), mode="bicubic", align_corners=False, antialias=True
    )
    grid = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([prefix, grid.reshape(*positions.shape[:-2], wanted, -1)], dim=-2)


def fit_positions(state_dict: dict[str, Tensor], name: str, like: Tensor, num_prefix: int) -> None:
    """Resizes the position embeddings of a checkpoint in place if their number differs."""
    positions = state_dict.get(name)
    if positions is None or positions.shape == like.shape:
        return
    same_width = positions.shape[-1] == like.shape[-1] and positions.dim() == like.dim()
    if same_width:
        state_dict[name] = resize_positions(positions, like.shape[-2], num_prefix)


def _aliases(expected: Mapping[str, Tensor]) -> set[str]:
    """Returns the names of a network's tensors, and their names in other code bases."""
    names = set(expected)
    for name in expected:
        names.add(name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"))
        names.add(name.replace("reg_token", "register_tokens"))
        names.add(name.replace("ls1.gamma", "ls1.weight").replace("ls2.gamma", "ls2.weight"))
    return names


def _layer_scale(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Undoes the renaming of LayerScale's `gamma` to `weight` by older transformers."""
    renamed = {}
    for name, tensor in state_dict.items():
        gamma = re.sub(r"\.(ls[12])\.weight$", r".\1.gamma", name)
        renamed[gamma if gamma in expected else name] = tensor
    return renamed


def _timm_filter(model: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """Returns timm's function that adapts checkpoints to an architecture, or one that does nothing.

    The function is in the module that defines the class of the model, or one of its bases.
    """
    for kind in type(model).__mro__:
        module = sys.modules.get(kind.__module__)
        found: Any = getattr(module, "checkpoint_filter_fn", None)
        if found is not None and kind.__module__.startswith("timm."):
            return found
    return lambda state_dict, _: state_dict
