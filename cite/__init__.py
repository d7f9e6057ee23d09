"""CITE: adapts a frozen image encoder by visual prompts and text embeddings of the classes.

Zhang et al., "Text-guided Foundation Model Adaptation for Pathological Image Classification",
MICCAI 2023, https://arxiv.org/abs/2307.14901. `cite.mm` registers all parts for `mim train mmcls`
and `mim train mmpretrain`; the other modules need neither MMEngine nor these hosts.
"""

from typing import TYPE_CHECKING

from pathcore.lazy import lazy_exports

if TYPE_CHECKING:
    from cite.classifier import load_classifier as load_classifier
    from cite.encoders import open_encoder as open_encoder
    from cite.prompted import PromptedEncoder as PromptedEncoder
    from cite.text_embeddings import encode_texts as encode_texts
    from cite.text_encoder import build_text_encoder as build_text_encoder

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    "cite",
    {
        "PromptedEncoder": "cite.prompted",
        "build_text_encoder": "cite.text_encoder",
        "encode_texts": "cite.text_embeddings",
        "load_classifier": "cite.classifier",
        "open_encoder": "cite.encoders",
    },
)
