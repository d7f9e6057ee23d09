"""Prov-GigaPath: tile encoder, LongNet slide encoder, probing and fine-tuning.

Modules are imported on first access, so that `import gigapath` is cheap and
`gigapath.slide_encoder.create_model(...)` works as in the published instructions.
"""

from typing import TYPE_CHECKING

from pathcore.lazy import lazy_exports

if TYPE_CHECKING:
    from gigapath.embed.job import EmbeddingSettings as EmbeddingSettings
    from gigapath.embed.job import embed_slides as embed_slides
    from gigapath.embed.slide_vectors import describe_slide_encoder as describe_slide_encoder
    from gigapath.embed.tile_inference import describe_encoder as describe_encoder
    from gigapath.slide_encoder import create_model as create_model

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    "gigapath",
    {
        "EmbeddingSettings": "gigapath.embed.job",
        "create_model": "gigapath.slide_encoder",
        "describe_encoder": "gigapath.embed.tile_inference",
        "describe_slide_encoder": "gigapath.embed.slide_vectors",
        "embed_slides": "gigapath.embed.job",
    },
    (
        "classification_head",
        "longnet",
        "pipeline",
        "pos_embed",
        "preprocessing",
        "slide_encoder",
        "tile_encoder",
    ),
)
