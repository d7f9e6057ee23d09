"""Prompted image encoders as backbones of MMPreTrain and MMClassification.

All take the arguments of `cite.prompted.PromptedEncoder`: `prompt_length`, `prompt_layers`,
`prompt_pos`, `prompt_init`, `prompt_noise_std`, `frozen`, `lora`, `precision`, `save_frozen`,
`gradient_checkpointing`, `checkpoint`. They have no `init_weights`, so that MMEngine's runner does
not draw loaded weights anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from cite.encoders import build_encoder
from cite.encoders.timm_vit import read_timm_folder
from cite.mm.published import published_arguments
from cite.prompted import PromptedEncoder


@published_arguments({"float16": "precision='fp16'"})
class _Backbone(PromptedEncoder):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """Maps images to a tuple of one tensor `(batch, embed_dim)`, as the hosts expect."""
        return (super().forward(pixel_values),)


@MODELS.register_module()
class PromptedOpenCLIP(_Backbone):
    """An image tower of open_clip.

    Args:
        arch: Architecture of open_clip, or its description.
        project: Multiply by CLIP's projection.
        image_size: By default the architecture's.
        **arguments: Those of `PromptedEncoder`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        project: bool = True,
        image_size: int | None = None,
        **arguments: Any,
    ) -> None:
        encoder = build_encoder("open_clip", arch=arch, project=project, image_size=image_size)
        super().__init__(encoder, **arguments)


@MODELS.register_module()
class PromptedViT(_Backbone):
    """The hosts' own ViT, under its names.

    Args:
        arch: Name or sizes, see `cite.encoders.vit.ViTEncoder`.
        img_size: Side of the image in px.
        patch_size: Side of a patch in px.
        qkv_bias: Whether queries, keys and values have biases.
        pre_norm: A norm before the first block.
        final_norm: A norm after the last block.
        norm_eps: Of every norm.
        **arguments: Those of `PromptedEncoder`.
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
        **arguments: Any,
    ) -> None:
        encoder = build_encoder(
            "vit",
            arch=arch,
            img_size=img_size,
            patch_size=patch_size,
            qkv_bias=qkv_bias,
            pre_norm=pre_norm,
            final_norm=final_norm,
            norm_eps=norm_eps,
        )
        super().__init__(encoder, **arguments)


@MODELS.register_module()
class PromptedTimm(_Backbone):
    """A ViT of timm.

    Args:
        model: Name that timm knows.
        model_args: Arguments of `timm.create_model`.
        folder: Instead of both: a folder with `config.json` and weights, as timm's models lie on
            the hub.
        **arguments: Those of `PromptedEncoder`.

    Raises:
        ValueError: Both or none of folder and model.
    """

    def __init__(
        self,
        model: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        folder: str | None = None,
        **arguments: Any,
    ) -> None:
        if (folder is None) == (model is None):
            raise ValueError(f"{type(self).__name__}: either `folder` or `model` expected")
        if folder is not None:
            model, own = read_timm_folder(folder)
            model_args = {**own, **(model_args or {})}
            arguments.setdefault("checkpoint", folder)
        super().__init__(build_encoder("timm", model=model, model_args=model_args), **arguments)


@MODELS.register_module()
class UnpromptedTimm(_Backbone):
    """CTransPath, or any model of timm (Swin, ResNet, ...), without prompts.

    Args:
        model: `ctranspath`, `keep`, or a name that timm knows.
        model_args: Arguments of `timm.create_model`.
        **arguments: Those of `PromptedEncoder`.
    """

    def __init__(
        self, model: str, model_args: Mapping[str, Any] | None = None, **arguments: Any
    ) -> None:
        super().__init__(build_encoder("whole", model=model, model_args=model_args), **arguments)


@MODELS.register_module()
class PromptedHF(_Backbone):
    """A vision model of transformers.

    Args:
        folder: A Hugging Face folder: config and weights.
        config: Instead of the folder: a config, for random weights or those of `checkpoint`.
        project: For CLIP: multiply by the visual projection.
        **arguments: Those of `PromptedEncoder`.

    Raises:
        ValueError: Both or none of folder and config.
    """

    def __init__(
        self,
        folder: str | None = None,
        config: Mapping[str, Any] | None = None,
        project: bool = False,
        **arguments: Any,
    ) -> None:
        if (folder is None) == (config is None):
            raise ValueError(f"{type(self).__name__}: either `folder` or `config` expected")
        source = folder if folder is not None else config
        if folder is not None:
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"{folder}: a folder with config.json and weights expected")
            arguments.setdefault("checkpoint", folder)
        super().__init__(build_encoder("hf", config=source, project=project), **arguments)


@MODELS.register_module()
class PromptedPLIP(PromptedHF):
    """PA-LLaVA's PLIP encoder: the folder that its pretraining exports, or a released one.

    Args:
        folder: `config.json` and weights, in Hugging Face's or the released names.
        **arguments: Those of `PromptedEncoder`.
    """

    def __init__(self, folder: str, **arguments: Any) -> None:
        super().__init__(folder=folder, **arguments)
