"""Converts weights of vision transformers between the names of several libraries.

A table lists pairs of names and is used in both directions. `{}` is the index of a block,
`*` for `weight` or `bias`. Some libraries fuse queries, keys and values into one tensor.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pathcore.encoders.layouts import TRAINING_ONLY, pools_patches, unchunk_block
from pathcore.weights import shorten

_log = logging.getLogger(__name__)


class ConversionError(ValueError):
    """Raised if weights do not have the stated format, or the conversion does not exist."""


class Fused(NamedTuple):
    """A tensor that the other library stores as three tensors, its chunks along the first axis."""

    left: str
    right: tuple[str, str, str]


@dataclass(frozen=True)
class NameTable:
    """Names of the same tensors in two libraries.

    Attributes:
        left: Name of the first library, for error messages.
        right: Name of the second library, for error messages.
        pairs: Left and right names.
        fused: Left names with the three right names.
        transposed: Left names of tensors that are transposed on the right.
        unused_left: Patterns of left names without a counterpart, which are dropped.
        unused_right: Patterns of right names without a counterpart, which are dropped.
    """

    left: str
    right: str
    pairs: tuple[tuple[str, str], ...]
    fused: tuple[Fused, ...] = ()
    transposed: frozenset[str] = frozenset()
    unused_left: tuple[str, ...] = ()
    unused_right: tuple[str, ...] = ()

    def to_right(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts names of the left library to those of the right one.

        Raises:
            ConversionError: If a name is not in the table.
        """
        converted: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            for fused in self.fused:
                if (found := _match(fused.left, name)) is not None:
                    # Cloned, because chunks share memory, which safetensors refuses to write.
                    for target, part in zip(fused.right, tensor.chunk(3), strict=True):
                        converted[_fill_pattern(target, found)] = part.clone()
                    break
            else:
                other = _find_name(name, self.pairs, 0)
                if other is not None:
                    turn = name in self.transposed
                    converted[other] = tensor.t().contiguous() if turn else tensor
                elif not _is_unused(name, self.unused_left):
                    raise self._unknown(name, self.left, state_dict)
        return converted

    def to_left(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts names of the right library to those of the left one.

        Raises:
            ConversionError: If a name is not in the table, or a part of a fused tensor is missing.
        """
        converted: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            for fused in self.fused:
                matches = [_match(part, name) for part in fused.right]
                found = next((match for match in matches if match is not None), None)
                if found is not None:
                    names = [_fill_pattern(part, found) for part in fused.right]
                    if missing := [part for part in names if part not in state_dict]:
                        raise ConversionError(f"{self.right}: {name} is there, {missing} are not")
                    converted[_fill_pattern(fused.left, found)] = torch.cat(
                        [state_dict[n] for n in names]
                    )
                    break
            else:
                target = _find_name(name, self.pairs, 1)
                if target is not None:
                    turn = target in self.transposed
                    converted[target] = tensor.t().contiguous() if turn else tensor
                elif not _is_unused(name, self.unused_right):
                    raise self._unknown(name, self.right, state_dict)
        return converted

    def _unknown(self, name: str, library: str, state_dict: Mapping[str, Tensor]) -> Exception:
        return ConversionError(
            f"{name}: not a name of {library}, as the weights were said to be (the first of "
            f"{len(state_dict)} names is {next(iter(state_dict))})"
        )


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    expression = re.escape(pattern).replace(r"\{\}", r"(\d+)").replace(r"\*", "(weight|bias)")
    found = re.fullmatch(expression, name)
    return found.groups() if found else None


def _fill_pattern(pattern: str, found: tuple[str, ...]) -> str:
    for value in found:
        pattern = re.sub(r"\{\}|\*", value, pattern, count=1)
    return pattern


def _find_name(name: str, pairs: tuple[tuple[str, str], ...], side: int) -> str | None:
    for pair in pairs:
        found = _match(pair[side], name)
        if found is not None:
            return _fill_pattern(pair[1 - side], found)
    return None


def _is_unused(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


_HF_CLIP = "vision_model.encoder.layers.{}."
CLIP_HF = NameTable(
    left="OpenAI's CLIP",
    right="Hugging Face's CLIP",
    pairs=(
        ("class_embedding", "vision_model.embeddings.class_embedding"),
        ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("ln_pre.*", "vision_model.pre_layrnorm.*"),
        ("ln_post.*", "vision_model.post_layernorm.*"),
        ("ln_post.*", "vision_model.post_layrnorm.*"),  # misspelled in PA-LLaVA's PLIP
        ("proj", "visual_projection.weight"),
        ("transformer.resblocks.{}.ln_1.*", f"{_HF_CLIP}layer_norm1.*"),
        ("transformer.resblocks.{}.ln_2.*", f"{_HF_CLIP}layer_norm2.*"),
        ("transformer.resblocks.{}.attn.out_proj.*", f"{_HF_CLIP}self_attn.out_proj.*"),
        ("transformer.resblocks.{}.mlp.c_fc.*", f"{_HF_CLIP}mlp.fc1.*"),
        ("transformer.resblocks.{}.mlp.c_proj.*", f"{_HF_CLIP}mlp.fc2.*"),
    ),
    fused=tuple(
        Fused(
            f"transformer.resblocks.{{}}.attn.in_proj_{part}",
            (
                f"{_HF_CLIP}self_attn.q_proj.{part}",
                f"{_HF_CLIP}self_attn.k_proj.{part}",
                f"{_HF_CLIP}self_attn.v_proj.{part}",
            ),
        )
        for part in ("weight", "bias")
    ),
    transposed=frozenset({"proj"}),
    unused_right=(
        r".*\.position_ids",
        r"(text_model|text_projection)\..*",
        r"logit_(scale|bias)",
    ),
)

MM_TIMM = NameTable(
    left="MMPreTrain's ViT",
    right="timm's ViT",
    pairs=(
        ("cls_token", "cls_token"),
        ("pos_embed", "pos_embed"),
        ("patch_embed.projection.*", "patch_embed.proj.*"),
        ("pre_norm.*", "norm_pre.*"),
        ("layers.{}.ln1.*", "blocks.{}.norm1.*"),
        ("layers.{}.ln2.*", "blocks.{}.norm2.*"),
        ("layers.{}.attn.qkv.*", "blocks.{}.attn.qkv.*"),
        ("layers.{}.attn.proj.*", "blocks.{}.attn.proj.*"),
        ("layers.{}.ffn.layers.0.0.*", "blocks.{}.mlp.fc1.*"),
        ("layers.{}.ffn.layers.1.*", "blocks.{}.mlp.fc2.*"),
        ("ln1.*", "norm.*"),
    ),
    unused_left=(r"head\..*",),
    unused_right=(r"(head|fc_norm|predictor)\..*",),
)

_HF_LAYER = "encoder.layer.{}."
_HF_SHARED = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("blocks.{}.attn.proj.*", f"{_HF_LAYER}attention.output.dense.*"),
    ("norm.*", "layernorm.*"),
)
_HF_FUSED = tuple(
    Fused(
        f"blocks.{{}}.attn.qkv.{part}",
        (
            f"{_HF_LAYER}attention.attention.query.{part}",
            f"{_HF_LAYER}attention.attention.key.{part}",
            f"{_HF_LAYER}attention.attention.value.{part}",
        ),
    )
    for part in ("weight", "bias")
)
TIMM_HF_VIT = NameTable(
    left="timm's ViT",
    right="Hugging Face's ViT",
    pairs=(
        *_HF_SHARED,
        ("blocks.{}.norm1.*", f"{_HF_LAYER}layernorm_before.*"),
        ("blocks.{}.norm2.*", f"{_HF_LAYER}layernorm_after.*"),
        ("blocks.{}.mlp.fc1.*", f"{_HF_LAYER}intermediate.dense.*"),
        ("blocks.{}.mlp.fc2.*", f"{_HF_LAYER}output.dense.*"),
    ),
    fused=_HF_FUSED,
    unused_left=(r"head\..*",),
    unused_right=(r"(pooler|classifier)\..*", r"embeddings\.mask_token"),
)
TIMM_HF_DINOV2 = NameTable(
    left="timm's DINOv2",
    right="Hugging Face's DINOv2",
    pairs=(
        *_HF_SHARED,
        ("blocks.{}.norm1.*", f"{_HF_LAYER}norm1.*"),
        ("blocks.{}.norm2.*", f"{_HF_LAYER}norm2.*"),
        ("blocks.{}.ls1.gamma", f"{_HF_LAYER}layer_scale1.lambda1"),
        ("blocks.{}.ls2.gamma", f"{_HF_LAYER}layer_scale2.lambda1"),
        ("blocks.{}.mlp.fc1.*", f"{_HF_LAYER}mlp.fc1.*"),
        ("blocks.{}.mlp.fc2.*", f"{_HF_LAYER}mlp.fc2.*"),
        # These left names are Meta's. `_dinov2_to_timm` renames them to timm's mlp.fc1, mlp.fc2 and
        # reg_token.
        ("blocks.{}.mlp.w12.*", f"{_HF_LAYER}mlp.weights_in.*"),
        ("blocks.{}.mlp.w3.*", f"{_HF_LAYER}mlp.weights_out.*"),
        ("register_tokens", "embeddings.register_tokens"),
    ),
    fused=_HF_FUSED,
    unused_left=(r"head\..*", "mask_token"),
    unused_right=(r"classifier\..*", r"embeddings\.mask_token"),
)


_PATCHES = "patch_embed.proj.weight"


def published_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the ViT from checkpoints of MAE, RETFound, DINO (HIPT) and DINOv2, in timm's names.

    Decoder, heads and mask token of the training are dropped with a warning, and prefixes such as
    `backbone.` are removed.

    Raises:
        ConversionError: If there is not exactly one ViT, or it pools patch tokens.
    """
    prefixes = [name.removesuffix(_PATCHES) for name in state_dict if name.endswith(_PATCHES)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    if len(prefixes) != 1:
        raise ConversionError(
            f"timm: expected one ViT with {_PATCHES}, found {len(prefixes)} among "
            f"{len(state_dict)} names (the first is {next(iter(state_dict), None)})"
        )
    found, dropped = {}, []
    for name, tensor in state_dict.items():
        inner = unchunk_block(name.removeprefix(prefixes[0]))
        if name.startswith(prefixes[0]) and not inner.startswith(TRAINING_ONLY):
            found[inner] = tensor
        else:
            dropped.append(name)
    if pools_patches(found):
        raise ConversionError(
            "weights fine-tuned on the mean of the patches (fc_norm, no norm): the target formats "
            "read the class token, which was never trained; load them as they are, with "
            "encoder='mae-b@FILE'"
        )
    if dropped:
        kinds = sorted({name.split(".")[0] for name in dropped})
        _log.warning("Dropped %d tensors that only training uses: %s", len(dropped), shorten(kinds))
    return _dinov2_to_timm(found)


def _dinov2_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames Meta's DINOv2 to timm's names.

    With registers, timm has no position embedding for the class token, so it is added to the token.
    """
    state_dict = {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
        for name, tensor in state_dict.items()
    }
    if "register_tokens" in state_dict:
        positions = state_dict["pos_embed"]
        state_dict["reg_token"] = state_dict.pop("register_tokens")
        state_dict["cls_token"] = state_dict["cls_token"] + positions[:, :1]
        state_dict["pos_embed"] = positions[:, 1:]
    return state_dict


def _timm_to_dinov2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reverts `_dinov2_to_timm`.

    The position embedding of the class token becomes zero, since the token already includes it.
    """
    named = {}
    for name, tensor in state_dict.items():
        stem, is_mlp, rest = name.partition(".mlp.fc")
        first, second = (state_dict.get(f"{stem}.mlp.fc{n}.weight") for n in (1, 2))
        if is_mlp and first is not None and second is not None:
            # SwiGLU multiplies the two halves of the first layer's output, so the second layer has
            # half as many inputs.
            is_swiglu = first.shape[0] == 2 * second.shape[1]
            layer = "fc" + rest[0] if not is_swiglu else "w12" if rest[0] == "1" else "w3"
            name = f"{stem}.mlp.{layer}{rest[1:]}"
        named[name] = tensor
    if "reg_token" in named:
        positions = named["pos_embed"]
        named["register_tokens"] = named.pop("reg_token")
        named["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return named


def hf_dinov2_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts DINOv2, with or without registers and SwiGLU, from transformers' names to timm's."""
    return _dinov2_to_timm(TIMM_HF_DINOV2.to_left(state_dict))


def timm_to_hf_dinov2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts DINOv2 from timm's names to those of transformers."""
    return TIMM_HF_DINOV2.to_right(_timm_to_dinov2(state_dict))


def moco_v3_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the base encoder of MoCo v3, not the momentum encoder, in timm's names.

    MoCo v3: Chen et al. 2021 (https://arxiv.org/abs/2104.02057).

    Raises:
        ConversionError: If there is no `base_encoder`.
    """
    encoder: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        if name.startswith("base_encoder.") and not name.startswith("base_encoder.head."):
            encoder[name.removeprefix("base_encoder.")] = tensor
    if not encoder:
        raise ConversionError("MoCo v3: expected names that begin with module.base_encoder.")
    return encoder


def clip_vision_from_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the image tower of Hugging Face's CLIP, in OpenAI's names without `visual.`."""
    return CLIP_HF.to_left(state_dict)


def clip_vision_to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts CLIP's image tower, with or without prefix `visual.`, to Hugging Face's names."""
    prefixed = {k: v for k, v in state_dict.items() if k.startswith("visual.")}
    names = {k.removeprefix("visual."): v for k, v in prefixed.items()} or state_dict
    return CLIP_HF.to_right(names)


Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

_TO_TIMM: dict[str, Convert] = {
    "timm": published_to_timm,
    "moco-v3": moco_v3_to_timm,
    "mm": MM_TIMM.to_right,
    "hf-vit": TIMM_HF_VIT.to_left,
    "hf-dinov2": hf_dinov2_to_timm,
}
_FROM_TIMM: dict[str, Convert] = {
    "timm": dict,
    "mm": MM_TIMM.to_left,
    "hf-vit": TIMM_HF_VIT.to_right,
    "hf-dinov2": timm_to_hf_dinov2,
}
_CLIP: dict[tuple[str, str], Convert] = {
    ("clip", "hf-clip"): clip_vision_to_hf,
    ("hf-clip", "clip"): clip_vision_from_hf,
}
SOURCES = (*_TO_TIMM, "clip", "hf-clip")
TARGETS = (*_FROM_TIMM, "clip", "hf-clip")


def convert(state_dict: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Converts the weights of an image encoder.

    Args:
        state_dict: The weights.
        source: Format of the weights, one of `SOURCES`.
        target: Format to convert to, one of `TARGETS`.

    Raises:
        ConversionError: If the conversion does not exist, or a name is not one of the source
            format.

    Example:
        >>> weights = {"layers.0.ffn.layers.1.bias": torch.zeros(768)}
        >>> list(convert(weights, source="mm", target="hf-vit"))
        ['encoder.layer.0.output.dense.bias']
    """
    if (source, target) in _CLIP:
        return _CLIP[source, target](state_dict)
    if source in _TO_TIMM and target in _FROM_TIMM and source != target:
        return _FROM_TIMM[target](_TO_TIMM[source](state_dict))
    raise ConversionError(
        f"no conversion from {source!r} to {target!r}; ViTs: from {sorted(_TO_TIMM)} to "
        f"{sorted(_FROM_TIMM)}; CLIP: between 'clip' and 'hf-clip'"
    )
