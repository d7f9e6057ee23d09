"""Image encoders, prompted or not, as backbones of MMPreTrain and MMClassification.

They take the arguments of `cite.prompted.PromptedEncoder`: `prompt_length`, `prompt_layers`,
`prompt_pos`, `prompt_init`, `prompt_noise_std`, `frozen`, `lora`, `precision`, `save_frozen`,
`gradient_checkpointing`. They have no `init_weights`, because MMEngine's runner would call it and
overwrite loaded weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from cite.encoders import build_encoder, open_encoder
from cite.mm.published import published_arguments
from cite.prompted import PromptedEncoder

_PUBLISHED = published_arguments({"float16": "precision='fp16'"})


class _Backbone(PromptedEncoder):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """Maps images to a tuple of one tensor `(batch, embed_dim)`, as the hosts expect."""
        return (super().forward(pixel_values),)


@MODELS.register_module(name="PromptedEncoder")
@_PUBLISHED
class PromptedEncoderBackbone(_Backbone):
    """An encoder by name, or from a description.

    Args:
        encoder: Name for `pathcore.encoders.create_encoder`: a preset such as `uni2-h`,
            `NAME@/path`, `timm:`, `hf:`, `open_clip:ARCH@WEIGHTS`, or a folder. Or a description as
            in `pathcore.encoders.towers`, whose weights are those of `checkpoint` or random.
        checkpoint: File with the weights.
        feature: How the output becomes a vector, overriding the preset, see `Preset.feature`.
        arguments_of_encoder: Arguments of the architecture that override those of the preset.
        trust_remote_code: Whether code from the hub's repository may run.
        **arguments: Arguments of `cite.prompted.PromptedEncoder`.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any],
        checkpoint: str | None = None,
        feature: str | None = None,
        arguments_of_encoder: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        **arguments: Any,
    ) -> None:
        if isinstance(encoder, str):
            opened = open_encoder(
                encoder,
                checkpoint,
                feature=feature,
                trust_remote_code=trust_remote_code,
                **(arguments_of_encoder or {}),
            )
        elif feature is not None or arguments_of_encoder is not None:
            raise ValueError(
                "PromptedEncoder: feature and arguments_of_encoder are for a name; put them into "
                "the description"
            )
        else:
            opened = build_encoder(dict(encoder), checkpoint)
        super().__init__(opened, **arguments)


@MODELS.register_module()
@_PUBLISHED
class PromptedViT(_Backbone):
    """The ViT of MMPreTrain and MMClassification, with the same parameter names.

    Args:
        arch: Name or sizes, see `cite.encoders.vit.ViTEncoder`.
        img_size: Side of the image in pixels.
        patch_size: Side of a patch in pixels.
        qkv_bias: Whether queries, keys and values have biases.
        pre_norm: Whether there is a norm before the first block.
        final_norm: Whether there is a norm after the last block.
        norm_eps: Epsilon of all norms.
        checkpoint: File with the weights.
        **arguments: Arguments of `cite.prompted.PromptedEncoder`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = "base",
        img_size: int = 224,
        patch_size: int = 16,
        qkv_bias: bool = True,
        pre_norm: bool = False,
        final_norm: bool = True,
        norm_eps: float = 1e-6,
        checkpoint: str | None = None,
        **arguments: Any,
    ) -> None:
        description = {
            "library": "mm",
            "arch": arch,
            "img_size": img_size,
            "patch_size": patch_size,
            "qkv_bias": qkv_bias,
            "pre_norm": pre_norm,
            "final_norm": final_norm,
            "norm_eps": norm_eps,
        }
        super().__init__(build_encoder(description, checkpoint), **arguments)
