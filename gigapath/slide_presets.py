"""Which slide vector: layer, pooling, tile size and unit of coordinates, by name.

Vectors that different pipelines call GigaPath's are not comparable: they come from other layers,
poolings and grids. A preset says which, and makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gigapath.slide_encoder import Layer, LongNetViT, Pooling

CoordsUnit = Literal["level0_px", "tile"]


@dataclass(frozen=True)
class SlideVector:
    """How a vector of a slide is made.

    Attributes:
        layer: The layer, as in `LongNetViT.embed`.
        pooling: The class token, or the mean of the tiles.
        tile_size: Side of a cell of the position grid in pixels at level 0; `"patch"` is the side
            that the slide's tiles have at level 0.
        coords_unit: Unit of the coordinates given: pixels at level 0, or numbers of tiles.
        source: Who makes such vectors.
    """

    layer: Layer
    pooling: Pooling
    tile_size: int | Literal["patch"] = 256
    coords_unit: CoordsUnit = "level0_px"
    source: str = ""

    def embed(
        self,
        model: LongNetViT,
        x: Tensor,
        coords: Tensor,
        patch_size_level0: int | None = None,
        padding_mask: Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Makes the vectors of slides.

        Args:
            model: The slide encoder; its own pooling and tile size are not used.
            x: `(B, L, C)` or `(L, C)`, tile embeddings.
            coords: `(B, L, 2)` or `(L, 2)`, in `coords_unit`.
            patch_size_level0: Side of the tiles in pixels at level 0, for `tile_size` `"patch"`.
            padding_mask: `(B, L)`, true where there is no tile.
            lengths: Number of tiles of each slide, instead of a mask.

        Returns:
            `(B, D)`.

        Raises:
            ValueError: The tiles' side is needed and not given; or as in `LongNetViT.forward`.
        """
        if self.tile_size == "patch":
            if patch_size_level0 is None:
                raise ValueError(
                    "patch_size_level0: this preset's grid has cells of the tiles' size; give "
                    "their side in pixels at level 0"
                )
            tile_size = patch_size_level0
        else:
            tile_size = self.tile_size
        if self.coords_unit == "tile":
            # Numbers of tiles may be stored in integers too short for pixels.
            coords = (coords if coords.is_floating_point() else coords.long()) * tile_size
        before = model.tile_size
        model.tile_size = tile_size
        try:
            return model.embed(x, coords, self.layer, self.pooling, padding_mask, lengths)
        finally:
            model.tile_size = before


PRESETS: dict[str, SlideVector] = {
    "gigapath": SlideVector(12, "cls", source="`last_layer_embed` of the published pipeline"),
    "trident": SlideVector(11, "mean", "patch", source="TRIDENT, `gigapath` slide encoder"),
    "lazyslide": SlideVector("final", "cls", source="LazySlide; `slide_encoder(x, coords)`"),
    "mean": SlideVector(
        "final", "mean", source="`global_pool=True`; the class token was not trained"
    ),
}
"""Vectors in use, for the released 12-layer encoder. `mean` is the one to take for new work."""


def get_preset(name: str) -> SlideVector:
    """Returns the preset of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
