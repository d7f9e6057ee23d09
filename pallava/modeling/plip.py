"""PLIP's vision encoder: a CLIP ViT that skips layers whose output is unused.

Shapes: B images, P patches per image, D hidden size. Radford et al. 2021 (arXiv:2103.00020).
Parameter names follow the published `plip` weights, which differ from Hugging Face's
`CLIPVisionModel` in one module (`post_layrnorm`) and one buffer (`position_ids`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pallava.modeling.linear import Linear

PUBLISHED_TO_HF = {"vision_model.post_layrnorm.": "vision_model.post_layernorm."}
POSITION_IDS = "vision_model.embeddings.position_ids"

_CPU_BATCH = 4
"""Tiles that a frozen encoder processes at once on a CPU. Their activations fit in the caches,
which is a fifth faster than a whole batch and takes a tenth of the memory (docs/benchmarks.md)."""


class _Attention(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class _Layer(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class _Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        num_positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        self.position_embedding = nn.Embedding(num_positions, config.hidden_size)
        self.register_buffer("position_ids", torch.arange(num_positions).expand(1, -1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class _Encoder(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _VisionTransformer(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        # The published parameter names contain both misspellings.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = _Encoder(config)
        self.post_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class PLIPVisionEncoder(nn.Module):
    """CLIP vision transformer with the published PLIP parameter names.

    Args:
        config: Sizes; PLIP itself is ViT-B/16 with 224 px, quick GELU and eps 1e-5.

    Raises:
        ValueError: If the image size is not a multiple of the patch size, or the hidden size not a
            multiple of the number of heads.

    Example:
        >>> config = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        ...                           num_attention_heads=4, image_size=32, patch_size=16)
        >>> PLIPVisionEncoder(config).features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 4, 64])
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        if config.image_size % config.patch_size:
            raise ValueError(
                f"image_size {config.image_size} is not a multiple of patch_size "
                f"{config.patch_size}"
            )
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}"
            )
        self.config = config
        self.gradient_checkpointing = False
        self.vision_model = _VisionTransformer(config)
        self.apply(self._init_weights)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.vision_model.pre_layrnorm.weight.dtype

    @property
    def num_patches(self) -> int:
        """Number of visual tokens per image, without the class token."""
        return (self.config.image_size // self.config.patch_size) ** 2

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """Runs all layers.

        Args:
            pixel_values: `(B, 3, image_size, image_size)`, normalised.
            output_hidden_states: Whether to also return the input and the output of every layer.

        Returns:
            `last_hidden_state` `(B, 1 + P, D)` after the final norm, as the published encoder
            returns it (Hugging Face returns it before the norm), its class token `pooler_output`
            `(B, D)`, and `hidden_states`, each `(B, 1 + P, D)`.
        """
        hidden_states = self._embed(pixel_values)
        collected = [hidden_states]
        for layer in self.vision_model.encoder.layers:
            hidden_states = self._run_layer(layer, hidden_states)
            if output_hidden_states:
                collected.append(hidden_states)
        last = self.vision_model.post_layrnorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last[:, 0],
            hidden_states=tuple(collected) if output_hidden_states else None,
        )

    def features(self, pixel_values: Tensor, select_layer: int = -2) -> Tensor:
        """Returns the patch features of one layer without computing the layers above it.

        No autograd graph is kept if all weights of the encoder are frozen.

        Args:
            pixel_values: `(B, 3, image_size, image_size)`, normalised.
            select_layer: Index into the `num_hidden_layers + 1` hidden states. PA-LLaVA uses -2,
                the output of the second-to-last layer.

        Returns:
            `(B, P, D)`, without the class token.

        Raises:
            ValueError: If `select_layer` is out of range.
        """
        num_states = self.config.num_hidden_layers + 1
        if not -num_states <= select_layer < num_states:
            raise ValueError(
                f"select_layer {select_layer}: the encoder has hidden states "
                f"{-num_states}..{num_states - 1}"
            )
        layers = self.vision_model.encoder.layers[: select_layer % num_states]
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        at_once = len(pixel_values)
        # Under ZeRO-3, processes gather each layer together, so all need the same number of calls.
        gathered = hasattr(next(self.parameters()), "ds_id")
        if frozen and not gathered and pixel_values.device.type == "cpu":
            at_once = min(at_once, _CPU_BATCH)
        with torch.no_grad() if frozen else nullcontext():
            parts = []
            for part in pixel_values.split(max(1, at_once)):
                hidden_states = self._embed(part)
                for layer in layers:
                    hidden_states = self._run_layer(layer, hidden_states)
                parts.append(hidden_states[:, 1:])
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes activations in the backward pass instead of storing them."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Stores the activations of every layer."""
        self.gradient_checkpointing = False

    def _embed(self, pixel_values: Tensor) -> Tensor:
        size = self.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: expected (batch, 3, {size}, {size}), found "
                f"{tuple(pixel_values.shape)}"
            )
        embeddings = self.vision_model.embeddings(pixel_values.to(self.dtype))
        return self.vision_model.pre_layrnorm(embeddings)

    def _run_layer(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, hidden_states, use_reentrant=False)
        return layer(hidden_states)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises weights as CLIP does (arXiv:2103.00020, github.com/openai/CLIP)."""
        config, factor = self.config, self.config.initializer_factor
        width, depth = config.hidden_size, config.num_hidden_layers
        if isinstance(module, _Embeddings):
            nn.init.normal_(module.class_embedding, std=width**-0.5 * factor)
            nn.init.normal_(module.patch_embedding.weight, std=config.initializer_range * factor)
            nn.init.normal_(module.position_embedding.weight, std=width**-0.5 * factor)
        elif isinstance(module, _Attention):
            for linear in (module.q_proj, module.k_proj, module.v_proj):
                nn.init.normal_(linear.weight, std=width**-0.5 * (2 * depth) ** -0.5 * factor)
                nn.init.zeros_(linear.bias)
            nn.init.normal_(module.out_proj.weight, std=width**-0.5 * factor)
            nn.init.zeros_(module.out_proj.bias)
        elif isinstance(module, _MLP):
            nn.init.normal_(module.fc1.weight, std=(2 * width) ** -0.5 * factor)
            nn.init.normal_(module.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5 * factor)
            nn.init.zeros_(module.fc1.bias)
            nn.init.zeros_(module.fc2.bias)


def published_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects the vision tower of a CLIP-like state dict and converts it to published names."""
    hf_to_published = {hf: published for published, hf in PUBLISHED_TO_HF.items()}
    kept: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("visual_encoder.")
        if name.startswith("vision_model."):
            kept[rename_prefixes(name, hf_to_published)] = tensor
    if kept and POSITION_IDS not in kept:
        # A constant buffer that newer Hugging Face versions no longer store.
        positions = kept.get("vision_model.embeddings.position_embedding.weight")
        if positions is not None:
            kept[POSITION_IDS] = torch.arange(len(positions)).expand(1, -1)
    return kept


def rename_prefixes(name: str, prefixes: Mapping[str, str]) -> str:
    """Replaces the first matching prefix of `name`; `prefixes` maps old to new."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
