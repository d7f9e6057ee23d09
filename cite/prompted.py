"""Frozen image encoder with visual prompts, and the alternatives: LoRA, full fine-tuning, none.

Shapes: B images, T tokens of an image, D width, E features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from cite.blocks import Block
from cite.encoders.base import Encoder
from cite.prompts import Prompts, PromptSpec

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PROMPTED_FAMILIES = (
    "VisionTransformer of timm (DINOv2, UNI, Virchow, MAE and others), CLIP's image tower of "
    "open_clip, CLIP, DINOv2, ViT and DeiT of transformers, and the ViT of MMClassification"
)

_CPU_BATCH = 8
"""Number of images per pass through the blocks on a CPU; measured in docs/benchmarks.md."""

_OF_PROMPTS = ("prompt", "prompt_initialised")
_ENCODER, _PROMPTS = "encoder.model.", "prompts."
_PUBLISHED = "model."
"""Prefix of the image tower within the backbone in checkpoints of the published code."""


class PromptedEncoder(nn.Module):
    """Frozen encoder with visual prompts; skips computation that the features do not depend on.

    Blocks below the first prompted one build no graph. If features depend only on the class token,
    the last block computes only that token. If nothing is trained, features equal those of
    `pathcore.encoders` exactly. In state dicts, the encoder's tensors have the names of their
    library and the prompts are called `prompt`, as in the published checkpoints.

    Args:
        encoder: The encoder to adapt.
        prompt_length: Number of prompts per prompted block; 0 for none.
        prompt_layers: Indices of the blocks before which prompts are inserted; None for the first.
        prompt_pos: `prepend` or `add`, see `PromptSpec`.
        prompt_init: `uniform`, `normal`, `zero`, `kaiming` or `token`.
        prompt_noise_std: Standard deviation of noise on the initial prompts, see `PromptSpec`.
        frozen: Whether the encoder is frozen; False trains all of it.
        lora: Arguments of PEFT's `LoraConfig`; by default it adapts `Encoder.lora_targets`. None
            for no LoRA.
        precision: Type of the weights and computations of a frozen encoder: `fp32`, `bf16` or
            `fp16`. Norms, embeddings and trained parameters stay in fp32.
        save_frozen: Whether state dicts contain the frozen weights; otherwise they are loaded from
            the encoder's own file again.
        gradient_checkpointing: Whether to recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: If the arguments contradict each other or the encoder.

    Example:
        >>> from cite.encoders import build_encoder
        >>> arch = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=16)
        >>> encoder = build_encoder(dict(library="mm", arch=arch, img_size=16, patch_size=8))
        >>> model = PromptedEncoder(encoder, prompt_length=3)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['prompts.prompt']
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        prompt_length: int = 0,
        prompt_layers: Sequence[int] | None = None,
        prompt_pos: str = "prepend",
        prompt_init: str = "token",
        prompt_noise_std: float = 0.0,
        frozen: bool = True,
        lora: Mapping[str, Any] | None = None,
        precision: str = "fp32",
        save_frozen: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(frozen, lora, precision, save_frozen, encoder.has_weights)
        self.encoder = encoder
        self.embed_dim = encoder.embed_dim
        self.frozen = frozen
        self.precision = precision
        self.save_frozen = save_frozen
        self.gradient_checkpointing = gradient_checkpointing
        self.adapted = lora is not None
        self.untouched = frozen and lora is None and not prompt_length
        if not self.untouched:
            encoder.take_apart()
        if frozen:
            encoder.requires_grad_(False)
            lower_precision(encoder, PRECISIONS[precision])
        if lora is not None:
            _add_lora(encoder, lora)
        num_blocks = 0 if self.untouched else len(encoder.blocks())
        self.prompts = None
        if num_blocks:
            spec = PromptSpec.from_arguments(
                *(prompt_length, prompt_layers, prompt_pos, prompt_init, prompt_noise_std),
                num_blocks=num_blocks,
            )
            self.prompts = Prompts(spec, encoder.width) if prompt_length else None
        elif prompt_length:
            raise ValueError(
                f"prompt_length {prompt_length}: {type(encoder.model).__name__} takes no prompts; "
                f"expected 0; prompts are for {PROMPTED_FAMILIES}"
            )
        self.register_load_state_dict_pre_hook(_to_own_names)
        self.register_state_dict_post_hook(_to_published_names)
        self.train()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Computes features.

        Args:
            pixel_values: `(B, 3, height, width)`, normalised as the encoder was trained.

        Returns:
            float32 `(B, E)`.

        Raises:
            ValueError: If the encoder does not accept the shape.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values: expected (batch, 3, height, width), "
                f"found {tuple(pixel_values.shape)}"
            )
        size = self.encoder.image_size
        if size is not None and tuple(pixel_values.shape[2:]) != tuple(size):
            raise ValueError(
                f"pixel_values: the encoder takes images of {size[0]} x {size[1]} px, found "
                f"{pixel_values.shape[2]} x {pixel_values.shape[3]}; set ResizePatch(size=...), or "
                "the encoder's image size, which fits the positions"
            )
        if self.untouched:
            return self._as_in_the_library(pixel_values)
        if self.prompts is not None and not self.prompts.checked:
            with torch.no_grad():
                self.prompts.initialise(self.encoder.embed(pixel_values))
        at_once = _CPU_BATCH if pixel_values.device.type == "cpu" else len(pixel_values)
        parts = [self._features(part) for part in pixel_values.split(max(1, at_once))]
        return torch.cat(parts).float()

    def train(self, mode: bool = True) -> PromptedEncoder:
        """Sets the training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def frozen_weights(self) -> dict[str, Tensor]:
        """Returns what state dicts lack without `save_frozen`, under its names in state dicts."""
        model = self.encoder.model
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        return {name: t for name, t in model.state_dict().items() if name not in trained}

    @torch.no_grad()
    def _as_in_the_library(self, pixel_values: Tensor) -> Tensor:
        """Computes features like `pathcore.encoders.Encoder.features`.

        With fp32, autocast of the host library stays in effect.
        """
        if self.precision == "fp32":
            return self.encoder.features(pixel_values).float()
        with torch.autocast(pixel_values.device.type, PRECISIONS[self.precision]):
            return self.encoder.features(pixel_values).float()

    def _features(self, pixel_values: Tensor) -> Tensor:
        encoder, prompts = self.encoder, self.prompts
        blocks = encoder.blocks()
        if not blocks:
            return encoder.features(pixel_values)
        last = len(blocks) - 1
        # Index of the first block whose output depends on a trained parameter; -1 if the embedding
        # does. Everything before it runs without a graph.
        if not self.frozen or self.adapted:
            first_graph = -1
        else:
            first_graph = prompts.spec.layers[0] if prompts is not None else len(blocks)
        wanted = torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted and first_graph < 0):
            hidden_states = encoder.embed(pixel_values)
        for index, block in enumerate(blocks):
            # All tokens still serve as keys and values. On a CPU, this saves 12 % of the time of a
            # training step with a ViT-B/16.
            num_queries = 1 if index == last and encoder.pools_class_token else None
            with torch.set_grad_enabled(wanted and index >= first_graph):
                if prompts is not None:
                    hidden_states = prompts.enter(hidden_states, index, encoder.num_prefix)
                hidden_states = self._run_block(block, hidden_states, num_queries)
        with torch.set_grad_enabled(wanted and first_graph <= last):
            return encoder.pool(self._without_prompts(hidden_states))

    def _run_block(self, block: Block, hidden_states: Tensor, num_queries: int | None) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return recompute(block, hidden_states, num_queries, use_reentrant=False)
        return block(hidden_states, num_queries)

    def _without_prompts(self, hidden_states: Tensor) -> Tensor:
        spec = self.prompts.spec if self.prompts is not None else None
        if spec is None or spec.position == "add" or self.encoder.pools_class_token:
            return hidden_states
        prefix = self.encoder.num_prefix
        return torch.cat([hidden_states[:, :prefix], hidden_states[:, prefix + spec.length :]], 1)


def lower_precision(encoder: Encoder, dtype: torch.dtype) -> None:
    """Converts the weights of linear layers, convolutions and CLIP's projection to another type.

    Attention pooling is not converted.
    """
    if dtype == torch.float32:
        return
    for name, module in encoder.model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("attn_pool."):
            module.to(dtype)
    projection = getattr(encoder.model, "proj", None)
    if isinstance(projection, nn.Parameter):
        projection.data = projection.data.to(dtype)


def _check_arguments(
    frozen: bool,
    lora: Mapping[str, Any] | None,
    precision: str,
    save_frozen: bool,
    has_weights: bool,
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected one of {list(PRECISIONS)}")
    if not frozen and precision != "fp32":
        raise ValueError(
            f"precision {precision!r} with frozen=False: weights that are trained stay in fp32; "
            "use AmpOptimWrapper for mixed precision"
        )
    if lora is not None and not frozen:
        raise ValueError("lora with frozen=False: LoRA is for a frozen encoder")
    if not save_frozen and not has_weights:
        raise ValueError("save_frozen=False: needs `checkpoint`, or the weights would be lost")


def _add_lora(encoder: Encoder, lora: Mapping[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(encoder.lora_targets)
    for kind in (nn.Linear, nn.Conv2d):  # a ResNet has no linear layers
        targets = targets or [
            name
            for name, module in encoder.model.named_modules()
            # PEFT cannot merge grouped convolutions. The attention pooling of CLIP's ResNet reads
            # the weights of its layers directly, so a wrapper around them would have no effect.
            if type(module) is kind
            and getattr(module, "groups", 1) == 1
            and not name.startswith("attnpool.")
        ]
    arguments = {"target_modules": targets, **lora}
    inject_adapter_in_model(LoraConfig(**arguments), encoder.model)


def merge_lora(encoder: Encoder) -> None:
    """Merges LoRA into the encoder's weights, whose names are those of the library again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(encoder.model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            encoder.model.set_submodule(name, module.get_base_layer())


def _to_own_names(
    module: PromptedEncoder, state_dict: dict[str, Any], prefix: str, *args: object
) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        rest = name[len(prefix) :]
        if not rest.startswith((_ENCODER, _PROMPTS)):
            owner = _PROMPTS if rest in _OF_PROMPTS else _ENCODER
            if not hasattr(module.encoder.model, "model"):
                rest = rest.removeprefix(_PUBLISHED)
            state_dict[f"{prefix}{owner}{rest}"] = state_dict.pop(name)
    if not module.save_frozen:
        # The frozen weights are already in the module. Adding them here lets strict loading pass.
        for name, tensor in module.frozen_weights().items():
            state_dict.setdefault(f"{prefix}{_ENCODER}{name}", tensor)


def _to_published_names(
    module: PromptedEncoder, state_dict: dict[str, Any], prefix: str, *args: object
) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        rest = name[len(prefix) :].removeprefix(_ENCODER).removeprefix(_PROMPTS)
        state_dict[prefix + rest] = state_dict.pop(name)
    if not module.save_frozen:
        for name in module.frozen_weights():
            state_dict.pop(prefix + name, None)
