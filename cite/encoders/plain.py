"""Plain vision transformers of timm, open_clip and transformers, split into blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cite.blocks import Block, Packed, PackedAttention, QuickGELU, Split, normalise
from cite.encoders.base import Encoder
from pathcore.encoders.towers import CLIP_TYPES, TOKEN_FEATURES, VIT_TYPES, TokenPooling, Tower


class TimmViT(Encoder):
    """timm's `VisionTransformer`, for example DINOv2, UNI, Prov-GigaPath's tile encoder."""

    lora_targets = ("qkv", "attn.proj")

    def __init__(self, tower: Tower, *, has_weights: bool = False) -> None:
        super().__init__(tower, has_weights=has_weights)
        self.width = self.model.embed_dim
        self.num_prefix = self.model.num_prefix_tokens
        pools_token = self.model.global_pool == "token" and self.model.attn_pool is None
        self.pools_class_token = tower.feature == "class" or (
            tower.feature == "output" and pools_token
        )

    @staticmethod
    def takes(module: Any) -> bool:
        """Returns whether a module is such a model with standard blocks."""
        from timm.layers import Attention
        from timm.models.vision_transformer import Block as TimmBlock
        from timm.models.vision_transformer import VisionTransformer

        return isinstance(module, VisionTransformer) and all(
            type(block) is TimmBlock
            and type(block.attn) is Attention
            and getattr(block.attn, "gate", None) is None
            for block in module.blocks
        )

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
        """See `Encoder`; applies `norm` and `fc_norm`, one of which is an identity."""
        model, feature = self.model, self.tower.feature
        if self.pools_class_token:
            return normalise(model.fc_norm, normalise(model.norm, hidden_states[:, 0]))
        tokens = normalise(model.norm, hidden_states.float())
        if feature == "output" or (feature == "mean" and model.global_pool == "avg"):
            return normalise(model.fc_norm, model.pool(tokens))
        return TokenPooling(feature, self.num_prefix)(tokens)


class OpenClipViT(Encoder):
    """Image tower of open_clip, for example of OpenAI's CLIP, PathGen-CLIP and QuiltNet.

    Parameters have the names of OpenAI's CLIP without `visual.`.
    """

    lora_targets = ("qkv", "out_proj")

    def __init__(self, tower: Tower, *, has_weights: bool = False) -> None:
        super().__init__(tower, has_weights=has_weights)
        self.width = self.model.conv1.out_channels
        self.pools_class_token = self.model.pool_type == "tok"
        height, width = self.model.image_size
        self.image_size = (height, width)

    @staticmethod
    def takes(module: Any) -> bool:
        """Returns whether a module is such a tower with standard blocks and pooling."""
        from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

        return (
            isinstance(module, VisionTransformer)
            and module.attn_pool is None
            and module.pool_type in ("tok", "avg")
            and all(type(block) is ResidualAttentionBlock for block in module.transformer.resblocks)
        )

    def take_apart(self) -> None:
        """See `Encoder`; replaces torch's attention, which LoRA cannot wrap."""
        for block in self.model.transformer.resblocks:
            if not isinstance(block.attn, PackedAttention):
                block.attn = PackedAttention(block.attn)
            if self.spec["config"].get("quick_gelu"):
                block.mlp.gelu = QuickGELU()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder`; returns the tokens after `ln_pre`."""
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


class TransformersViT(Encoder):
    """CLIP (and PLIP), DINOv2, ViT and DeiT of transformers."""

    def __init__(self, tower: Tower, *, has_weights: bool = False) -> None:
        super().__init__(tower, has_weights=has_weights)
        config = self.model.config
        self.is_clip = config.model_type in CLIP_TYPES
        self.width = int(config.hidden_size)
        self.num_prefix = 1 + (getattr(config, "num_register_tokens", 0) or 0)
        self.num_prefix += config.model_type == "deit"
        self.num_heads = int(config.num_attention_heads)
        self.pools_class_token = tower.feature in ("class", "pooler", "projected")
        self.lora_targets = (
            ("q_proj", "v_proj") if self.is_clip else ("attention.query", "attention.value")
        )

    def embed(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder`."""
        if self.is_clip:
            model = self.model.vision_model
            dtype = model.embeddings.patch_embedding.weight.dtype
            tokens = model.embeddings(pixel_values.to(dtype)).to(dtype)
            return normalise(model.pre_layrnorm, tokens)
        dtype = self.model.embeddings.patch_embeddings.projection.weight.dtype
        return self.model.embeddings(pixel_values.to(dtype)).to(dtype)

    def blocks(self) -> Sequence[Block]:
        """See `Encoder`."""
        if self.is_clip:
            layers = self.model.vision_model.encoder.layers
            return [_clip_block(layer, self.num_heads) for layer in layers]
        vit = self.model.config.model_type in VIT_TYPES
        make: Callable[[Any, int], Block] = _vit_block if vit else _dino_block
        return [make(layer, self.num_heads) for layer in self.model.encoder.layer]

    def pool(self, hidden_states: Tensor) -> Tensor:
        """See `Encoder`."""
        feature = self.tower.feature
        if not self.is_clip:
            if self.pools_class_token:
                hidden_states = hidden_states[:, :1]
                feature = "class"
            normed = normalise(self.model.layernorm, hidden_states)
            return TokenPooling(feature, self.num_prefix)(normed)
        if feature in TOKEN_FEATURES:  # not normalised, since CLIP only has a norm in the pooler
            return TokenPooling(feature, self.num_prefix)(hidden_states)
        features = normalise(self.model.vision_model.post_layernorm, hidden_states[:, 0])
        project = getattr(self.model, "visual_projection", None)
        return features if project is None else project(features)


def _clip_block(layer: Any, num_heads: int) -> Block:
    attention = layer.self_attn
    return Block(
        norm1=layer.layer_norm1,
        project=Split(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=num_heads,
        out=attention.out_proj,
        norm2=layer.layer_norm2,
        mlp=layer.mlp,
    )


def _dino_block(layer: Any, num_heads: int) -> Block:
    attention = layer.attention.attention
    return Block(
        norm1=layer.norm1,
        project=Split(attention.query, attention.key, attention.value),
        num_heads=num_heads,
        out=layer.attention.output.dense,
        norm2=layer.norm2,
        mlp=layer.mlp,
        scale1=layer.layer_scale1,
        scale2=layer.layer_scale2,
    )


def _vit_block(layer: Any, num_heads: int) -> Block:
    attention = layer.attention.attention
    return Block(
        norm1=layer.layernorm_before,
        project=Split(attention.query, attention.key, attention.value),
        num_heads=num_heads,
        out=layer.attention.output.dense,
        norm2=layer.layernorm_after,
        mlp=lambda hidden: layer.output.dense(layer.intermediate(hidden)),
    )
