"""PA-LLaVA: pathology vision encoder, scale-invariant connector, language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallava.inference.loading import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Imports `load_model` on first access, so that `import pallava` does not import torch."""
    if name == "load_model":
        from pallava.inference.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
