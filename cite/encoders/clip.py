"""CLIP's image towers through open_clip: OpenAI's, PathGen-CLIP's, PLIP's weights and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cite.blocks import Block, Packed, PackedAttention, QuickGELU, normalise
from cite.conversions import clip_vision_from_hf
from cite.encoders.base import Encoder, fit_positions


class OpenCLIPEncoder(Encoder):
    """The image tower of an open_clip architecture.

    Names are OpenAI CLIP's without `visual.`: `class_embedding`, `transformer.resblocks...`.

    Args:
        arch: Name of an architecture of open_clip, or its description (`embed_dim`, `vision_cfg`,
            `quick_gelu`). OpenAI's weights belong to the names that end in `-quickgelu`.
        project: Multiply by CLIP's projection, or give the class token after `ln_post`.
        image_size: By default the architecture's.

    Raises:
        ValueError: open_clip does not know it, or it is not a plain ViT.
    """

    lora_targets = ("qkv", "out_proj")

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        project: bool = True,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        config = _read_config(arch)
        if image_size is not None:
            config["vision_cfg"]["image_size"] = image_size
        self.spec = {"kind": "open_clip", "arch": config, "project": project}
        self.model = _build_tower(config)
        if not project:
            self.model.proj = None
        self.width = self.model.conv1.out_channels
        self.embed_dim = self.model.output_dim if project else self.width
        self.pools_class_token = self.model.pool_type == "tok"
        height, width = self.model.image_size
        self.image_size = (height, width)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder`; the tokens after `ln_pre`."""
        model = self.model
        patches = model.conv1(pixel_values.to(model.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = model.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        tokens = tokens + model.positional_embedding.to(patches.dtype)
        return normalise(model.ln_pre, tokens)

    def blocks(self) -> Sequence[Block]:
        """See `Encoder`."""
        return [
            Block(
                norm1=block.ln_1,
                project=Packed(block.attn.qkv),
                num_heads=block.attn.num_heads,
                out=block.attn.out_proj,
                norm2=block.ln_2,
                mlp=block.mlp,
                scale1=block.ls_1,
                scale2=block.ls_2,
            )
            for block in self.model.transformer.resblocks
        ]

    def pool(self, hidden_states: Tensor) -> Tensor:
        """See `Encoder`."""
        model = self.model
        if self.pools_class_token:
            features = normalise(model.ln_post, hidden_states[:, 0])
        elif model.final_ln_after_pool:
            features = normalise(model.ln_post, hidden_states[:, 1:].mean(dim=1))
        else:
            features = normalise(model.ln_post, hidden_states)[:, 1:].mean(dim=1)
        return features if model.proj is None else features @ model.proj

    def adapt_checkpoint(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the image tower out of a whole CLIP, in OpenAI's or Hugging Face's names."""
        if any(name.startswith("vision_model.") for name in state_dict):
            state_dict = clip_vision_from_hf(state_dict)
        if any(name.startswith("visual.") for name in state_dict):
            state_dict = {
                name.removeprefix("visual."): tensor
                for name, tensor in state_dict.items()
                if name.startswith("visual.")
            }
        adapted = dict(state_dict)
        if self.model.proj is None:
            adapted.pop("proj", None)
        fit_positions(adapted, "positional_embedding", self.model.positional_embedding, 1)
        return adapted


def _read_config(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    import json

    if not isinstance(arch, str):
        if "embed_dim" not in arch or "vision_cfg" not in arch:
            raise ValueError(f"arch: embed_dim and vision_cfg expected, found {sorted(arch)}")
        config = {k: arch[k] for k in ("embed_dim", "vision_cfg", "quick_gelu") if k in arch}
        return json.loads(json.dumps(config))
    import open_clip

    found = open_clip.get_model_config(arch)
    if found is None:
        import difflib

        known = open_clip.list_models()
        openai = f"{arch.replace('/', '-')}-quickgelu"
        if openai in known:
            # OpenAI's weights compute another GELU: under the plain name features differ, silently.
            near = f"OpenAI's CLIP is {openai!r}"
        else:
            near = f"near: {', '.join(difflib.get_close_matches(arch, known, n=3))}"
        raise ValueError(f"arch {arch!r}: open_clip does not know it; {near}")
    return {k: found[k] for k in ("embed_dim", "vision_cfg", "quick_gelu") if k in found}


def _build_tower(config: Mapping[str, Any]) -> nn.Module:
    from open_clip.model import _build_vision_tower  # the text tower is not built
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    model = _build_vision_tower(
        config["embed_dim"], dict(config["vision_cfg"]), bool(config.get("quick_gelu"))
    )
    plain = (
        isinstance(model, VisionTransformer)
        and model.attn_pool is None
        and model.pool_type in ("tok", "avg")
        and all(type(block) is ResidualAttentionBlock for block in model.transformer.resblocks)
    )
    if not plain:
        raise ValueError(
            f"arch {config}: a ViT of open_clip with plain blocks and class token or mean as "
            "pooling expected; for towers from timm use PromptedTimm"
        )
    for block in model.transformer.resblocks:
        block.attn = PackedAttention(block.attn)
        if config.get("quick_gelu"):
            block.mlp.gelu = QuickGELU()
    return model
