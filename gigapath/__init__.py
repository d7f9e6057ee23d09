"""Prov-GigaPath: tile encoder, LongNet slide encoder, probing and fine-tuning.

Modules are imported on first access, so that `import gigapath` is cheap and
`gigapath.slide_encoder.create_model(...)` works as in the published instructions.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "classification_head",
    "longnet",
    "pipeline",
    "pos_embed",
    "preprocessing",
    "slide_encoder",
    "tile_encoder",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"gigapath.{name}")
    raise AttributeError(f"module 'gigapath' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
