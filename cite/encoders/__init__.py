"""Image encoders of several libraries behind one interface; built from a description in JSON."""

from __future__ import annotations

from typing import Any

from cite.encoders.base import Encoder

KINDS = ("open_clip", "vit", "timm", "hf", "whole")


def build_encoder(kind: str, **arguments: Any) -> Encoder:
    """Builds an encoder with random weights.

    Args:
        kind: One of `KINDS`: a tower of open_clip, the ViT of MMClassification and MMPreTrain, a
            ViT of timm, a vision model of transformers, or any model of timm without prompts.
        **arguments: Those of the class.

    Raises:
        ValueError: No such kind.
    """
    if kind == "open_clip":
        from cite.encoders.clip import OpenCLIPEncoder

        return OpenCLIPEncoder(**arguments)
    if kind == "vit":
        from cite.encoders.vit import ViTEncoder

        return ViTEncoder(**arguments)
    if kind == "timm":
        from cite.encoders.timm_vit import TimmEncoder

        return TimmEncoder(**arguments)
    if kind == "hf":
        from cite.encoders.hugging_face import HuggingFaceEncoder

        return HuggingFaceEncoder(**arguments)
    if kind == "whole":
        from cite.encoders.whole import WholeEncoder

        return WholeEncoder(**arguments)
    raise ValueError(f"encoder {kind!r}: one of {KINDS} expected")
