"""The vision transformer of MMClassification and MMPreTrain, without these libraries.

Parameters have the same names (`layers.0.ln1.weight`), so that their checkpoints and those of the
published CITE load, and exported classifiers run without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cite.blocks import Block, Packed, normalise
from cite.encoders.base import Encoder
from pathcore.encoders.layouts import fit_positions
from pathcore.encoders.towers import Call, EncoderError, Tower
from pathcore.names import did_you_mean
from pathcore.weights import load_strict

ARCHITECTURES: dict[str, tuple[int, int, int, int]] = {
    "small": (768, 8, 8, 2304),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "eva-giant": (1408, 40, 16, 6144),
    "deit-tiny": (192, 12, 3, 768),
    "deit-small": (384, 12, 6, 1536),
    "deit-base": (768, 12, 12, 3072),
    "mocov3-small": (384, 12, 12, 1536),
}
"""Width, number of blocks, number of heads and hidden width of the MLP, as in mmcls'
`VisionTransformer.arch_zoo` and MMPreTrain's `MoCoV3ViT.arch_zoo`."""

_SHORT = {"s": "small", "b": "base", "l": "large", "h": "huge", "eva-g": "eva-giant"}
_SHORT |= {f"deit-{name[0]}": f"deit-{name}" for name in ("tiny", "small", "base")}
_FIELDS = ("embed_dims", "num_layers", "num_heads", "feedforward_channels")


class ViTEncoder(Encoder):
    """The ViT of MMClassification and MMPreTrain, with a class token.

    Args:
        arch: A key of `ARCHITECTURES`, or a dict of embed_dims, num_layers, num_heads and
            feedforward_channels.
        img_size: Side of the image in pixels.
        patch_size: Side of a patch in pixels.
        qkv_bias: Whether queries, keys and values have biases.
        pre_norm: Whether there is a norm before the first block, as in CLIP; the patch embedding
            has no bias then.
        final_norm: Whether there is a norm after the last block.
        norm_eps: Epsilon of all norms.
        weights: State dict with names of these libraries; random weights if None.
        source: Origin of the weights, for error messages.

    Raises:
        EncoderError: If the architecture is unknown.
        CheckpointError: If the weights do not fit.

    Example:
        >>> encoder = ViTEncoder("deit-tiny", img_size=32)
        >>> encoder.features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 192])
    """

    lora_targets = ("qkv", "proj")

    def __init__(
        self,
        arch: str | Mapping[str, int] = "base",
        img_size: int = 224,
        patch_size: int = 16,
        qkv_bias: bool = True,
        pre_norm: bool = False,
        final_norm: bool = True,
        norm_eps: float = 1e-6,
        weights: Mapping[str, Tensor] | None = None,
        source: str = "checkpoint",
    ) -> None:
        sizes = _read_arch(arch)
        options: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "qkv_bias": qkv_bias,
            "pre_norm": pre_norm,
            "final_norm": final_norm,
            "norm_eps": norm_eps,
        }
        model = _ViT(sizes, **options)
        if weights is not None:
            adapted = dict(weights)
            if not final_norm:
                adapted = {k: v for k, v in adapted.items() if not k.startswith("ln1.")}
            fit_positions(adapted, "pos_embed", model.pos_embed, 1)
            load_strict(model, adapted, what=f"ViT {sizes | options}", source=source)
        description = {"library": "mm", "arch": sizes, **options}
        tower = Tower(model, Call(model), sizes["embed_dims"], "class", description)
        super().__init__(tower, has_weights=weights is not None)
        self.num_heads = sizes["num_heads"]
        self.image_size = (img_size, img_size)

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder`."""
        hidden_states = self.embed(pixel_values)
        for block in self.blocks():
            hidden_states = block(hidden_states)
        return self.pool(hidden_states)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder`."""
        model, conv = self.model, self.model.patch_embed.projection
        patches = conv(pixel_values.to(conv.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = model.cls_token.to(patches.dtype).expand(len(patches), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + model.pos_embed.to(patches.dtype)
        return normalise(model.pre_norm, tokens)

    def blocks(self) -> Sequence[Block]:
        """See `Encoder`."""
        return [
            Block(
                norm1=layer.ln1,
                project=Packed(layer.attn.qkv),
                num_heads=self.num_heads,
                out=layer.attn.proj,
                norm2=layer.ln2,
                mlp=layer.ffn.layers,
            )
            for layer in self.model.layers
        ]

    def pool(self, hidden_states: Tensor) -> Tensor:
        """See `Encoder`; returns the class token after the final norm."""
        return normalise(self.model.ln1, hidden_states[:, 0])


class _ViT(nn.Module):
    def __init__(
        self,
        sizes: Mapping[str, int],
        img_size: int,
        patch_size: int,
        qkv_bias: bool,
        pre_norm: bool,
        final_norm: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        embed_dims, hidden = sizes["embed_dims"], sizes["feedforward_channels"]
        num_positions = (img_size // patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.empty(1, num_positions, embed_dims))
        self.patch_embed = nn.Module()
        self.patch_embed.projection = nn.Conv2d(
            3, embed_dims, patch_size, stride=patch_size, bias=not pre_norm
        )
        self.pre_norm = nn.LayerNorm(embed_dims, norm_eps) if pre_norm else nn.Identity()
        self.layers = nn.ModuleList(
            _layer(embed_dims, hidden, qkv_bias, norm_eps) for _ in range(sizes["num_layers"])
        )
        self.ln1 = nn.LayerNorm(embed_dims, norm_eps) if final_norm else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)


def _layer(width: int, hidden: int, qkv_bias: bool, eps: float) -> nn.Module:
    layer = nn.Module()
    layer.ln1, layer.ln2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
    layer.attn = nn.Module()
    layer.attn.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
    layer.attn.proj = nn.Linear(width, width)
    layer.ffn = nn.Module()
    inner = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
    layer.ffn.layers = nn.Sequential(inner, nn.Linear(hidden, width))
    return layer


def _read_arch(arch: str | Mapping[str, int]) -> dict[str, int]:
    if isinstance(arch, str):
        name = _SHORT.get(arch, arch)
        if name not in ARCHITECTURES:
            raise EncoderError(f"arch {arch!r}: unknown{did_you_mean(arch, ARCHITECTURES)}")
        return dict(zip(_FIELDS, ARCHITECTURES[name], strict=True))
    if set(arch) != set(_FIELDS):
        raise EncoderError(f"arch: expected the fields {_FIELDS}, found {sorted(arch)}")
    return {field: int(arch[field]) for field in _FIELDS}
