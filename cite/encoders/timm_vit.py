"""Vision transformers of timm: ImageNet's, DINOv2's, UNI's, Prov-GigaPath's tile encoder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cite.blocks import Block, Packed, normalise
from cite.encoders.base import Encoder, fit_positions
from pathcore.encoders.layouts import fit_layout, pools_patches
from pathcore.encoders.networks import NETWORKS
from pathcore.files import read_json

_log = logging.getLogger(__name__)


class TimmEncoder(Encoder):
    """A `VisionTransformer` of timm.

    Args:
        model: A name that timm knows, with random weights; `hf-hub:` names read their description
            from the hub.
        model_args: Arguments of `timm.create_model`, for instance `img_size`, `init_values`.

    Raises:
        ValueError: It is not a plain ViT, or timm does not know it.
    """

    lora_targets = ("qkv", "attn.proj")

    def __init__(self, model: str, model_args: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._name = model
        self._build({"num_classes": 0, **(model_args or {})})

    def _build(self, arguments: dict[str, Any]) -> None:
        self.spec = {"kind": "timm", "model": self._name, "model_args": arguments}
        self.model = _create(self._name, arguments)
        patch_embed = self.model.patch_embed
        if patch_embed.strict_img_size and not self.model.dynamic_img_size:
            self.image_size = patch_embed.img_size
        self.width = self.model.embed_dim
        self.embed_dim = self.model.num_features
        self.num_prefix = self.model.num_prefix_tokens
        self.pools_class_token = self.model.global_pool == "token" and self.model.attn_pool is None

    def embed(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder`."""
        model = self.model
        dtype = model.patch_embed.proj.weight.dtype
        tokens = model._pos_embed(model.patch_embed(pixel_values.to(dtype)))
        return normalise(model.norm_pre, tokens.to(dtype))

    def blocks(self) -> Sequence[Block]:
        """See `Encoder`."""
        return [
            Block(
                norm1=block.norm1,
                project=Packed(block.attn.qkv),
                num_heads=block.attn.num_heads,
                out=block.attn.proj,
                norm2=block.norm2,
                mlp=block.mlp,
                scale1=block.ls1,
                scale2=block.ls2,
                norm_query=block.attn.q_norm,
                norm_key=block.attn.k_norm,
                norm_context=block.attn.norm,
            )
            for block in self.model.blocks
        ]

    def pool(self, hidden_states: Tensor) -> Tensor:
        """See `Encoder`; timm's pooling, with `norm` or `fc_norm` where the model has it."""
        model = self.model
        if self.pools_class_token:
            return normalise(model.fc_norm, normalise(model.norm, hidden_states[:, 0]))
        return normalise(model.fc_norm, model.pool(normalise(model.norm, hidden_states.float())))

    def adapt_checkpoint(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames the layouts of DINOv2, MAE and others, drops what only training needs.

        Weights that were fine-tuned on the mean of the patches (MAE's `fc_norm`) switch the model
        to that pooling: their class token was never normalised.
        """
        arguments = self.spec["model_args"]
        if self.pools_class_token and pools_patches(state_dict):
            self._build({**arguments, "global_pool": "avg"})
        fitted = fit_layout(state_dict, self.model)
        if dropped := fitted.describe():
            _log.warning("%s: dropped %s", self.spec["model"], dropped)
        adapted = {k: v for k, v in fitted.state_dict.items() if not k.startswith("head.")}
        model = self.model
        if model.pos_embed is not None:
            prefix = 0 if model.no_embed_class else self.num_prefix
            fit_positions(adapted, "pos_embed", model.pos_embed, prefix)
        return adapted


def read_timm_folder(folder: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Reads which model lies in a folder of the hub's layout, as timm writes it.

    Args:
        folder: Holds `config.json` and weights, for instance Prov-GigaPath's tile encoder.

    Returns:
        Name and arguments of the model, for `TimmEncoder`.

    Raises:
        FileNotFoundError: No `config.json` in it.
        ValueError: It names no architecture.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, what="folder with config.json and weights")
    if not isinstance(config.get("architecture"), str):
        raise ValueError(f"{path}: `architecture`, as timm writes it, expected; {sorted(config)}")
    pooling = {"global_pool": config["global_pool"]} if config.get("global_pool") else {}
    return config["architecture"], {**pooling, **config.get("model_args", {}), "num_classes": 0}


def _create(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    import timm
    from timm.layers import Attention
    from timm.models.vision_transformer import Block as TimmBlock
    from timm.models.vision_transformer import VisionTransformer

    arguments = dict(arguments)
    if isinstance(arguments.get("mlp_layer"), str):
        arguments["mlp_layer"] = _mlp_layer(arguments["mlp_layer"])
    if isinstance(arguments.get("act_layer"), str):
        arguments["act_layer"] = timm.layers.get_act_layer(arguments["act_layer"])
    if name in NETWORKS:
        raise ValueError(f"model {name!r} takes no prompts; use UnpromptedTimm")
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except RuntimeError as error:
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:12]}*")[:3])
        raise ValueError(f"model {name!r}: {error}; near: {near}") from error
    plain = isinstance(model, VisionTransformer) and all(
        type(block) is TimmBlock
        and type(block.attn) is Attention
        and getattr(block.attn, "gate", None) is None
        for block in model.blocks
    )
    if not plain:
        raise ValueError(
            f"model {name!r}: a VisionTransformer of timm with plain blocks expected, found "
            f"{type(model).__name__}; without prompts use UnpromptedTimm"
        )
    return model


def _mlp_layer(name: str) -> type[nn.Module]:
    from timm import layers

    known: dict[str, type[nn.Module]] = {
        "Mlp": layers.Mlp,
        "SwiGLU": layers.SwiGLU,
        "SwiGLUPacked": layers.SwiGLUPacked,
    }
    if name not in known:
        raise ValueError(f"mlp_layer {name!r}: one of {sorted(known)} expected")
    return known[name]
