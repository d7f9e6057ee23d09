"""Error messages for names and arguments of the published code of CITE.

Configs of https://github.com/Yunkun-Zhang/CITE raise an error that names the replacement, instead
of `KeyError: not in the registry` or a bare `TypeError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mmengine.registry import MODELS, TRANSFORMS

Class = TypeVar("Class", bound=type)

TABLE = "configs/cite/gastric/README.md"

_MODELS = {
    "PromptedCLIPImageBackbone": "PromptedEncoder with encoder='open_clip:ViT-B-16-quickgelu@FILE'",
    "CLIPImageBackbone": "PromptedEncoder without prompts",
    "PromptedVisionTransformer": "PromptedViT",
    "VisionTransformerFrozen": "PromptedViT without prompts",
    "MyLinearClsHead": "LinearClsHead of MMClassification",
    "CLIPTextHead": "TextEmbeddingHead with text_encoder=dict(type='encoder', ...)",
}
_TRANSFORMS = {
    "CLIPPreprocess": "LoadPatch, ResizePatch(interpolation='bicubic', keep_ratio=True) and "
    "data_preprocessor=cite.mm.transforms.CLIP_NORM",
}


FLOAT16 = {
    "float16": "precision='fp16' of the backbone; neck and head compute in float32",
}
"""Replacement of an argument with which the published code computes CLIP, neck and head in fp16."""


class PublishedNameError(ValueError):
    """Raised for a name or argument of the published code that has another name here."""


def _refuse(name: str, replacement: str) -> type:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PublishedNameError(f"{name} of the published code is {replacement} here; see {TABLE}")

    return type(name, (), {"__init__": __init__, "__doc__": f"Published name of {replacement}."})


for _registry, _names in ((MODELS, _MODELS), (TRANSFORMS, _TRANSFORMS)):
    for _name, _replacement in _names.items():
        _registry.register_module(name=_name, module=_refuse(_name, _replacement))


def published_arguments(renamed: Mapping[str, str]) -> Callable[[Class], Class]:
    """Decorates a class so that arguments of the published code raise `PublishedNameError`.

    Args:
        renamed: Replacement of each published argument, for the message.
    """

    def decorate(kind: Class) -> Class:
        """Replaces `__init__` by one that rejects the published arguments."""
        original = kind.__init__

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in renamed.keys() & kwargs.keys():
                raise PublishedNameError(
                    f"{kind.__name__}: argument {name!r} of the published code: {renamed[name]}; "
                    f"see {TABLE}"
                )
            original(self, *args, **kwargs)

        kind.__init__ = __init__  # type: ignore[misc]
        return kind

    return decorate
