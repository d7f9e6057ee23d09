"""CITE: a frozen image encoder adapted by prompts and by the text embeddings of its classes.

Zhang et al., "Text-guided Foundation Model Adaptation for Pathological Image Classification",
MICCAI 2023, https://arxiv.org/abs/2307.14901. Modules outside `cite.mm` need torch and
transformers only; `cite.mm` registers everything for `mim train mmcls` and `mim train mmpretrain`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cite.classifier import load_classifier

__all__ = ["load_classifier"]


def __getattr__(name: str) -> Any:
    """Imports `load_classifier` when it is asked for: importing the package stays cheap."""
    if name == "load_classifier":
        from cite.classifier import load_classifier

        return load_classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
