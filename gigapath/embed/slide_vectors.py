"""Computes slide embeddings from tile embeddings, by presets for the variants in use.

The vectors that different pipelines call GigaPath's slide embedding are not comparable: they use
different layers, poolings and position grids. A preset names each variant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigapath import slide_encoder
from gigapath.embed.tile_inference import autocast
from gigapath.pos_embed import check_coords
from gigapath.slide_encoder import ARCHITECTURES, Layer, LongNetViT, Pooling
from gigapath.tile_encoder import FLASH_HUB_NAME, HUB_NAME, RANDOM
from pathcore.files import StrPath, atomic_file, sha256_of
from pathcore.names import UnknownNameError, did_you_mean
from wsi.features import EmbeddingError, check_features

NUM_GRIDS = 1000
"""Number of cells of the released encoders' position grid, along each axis."""

_ARCHITECTURE_OF = {1536: "gigapath_slide_enc12l768d", 384: "gigapath_slide_enc12l384d"}
"""Released slide encoder for each width of the released tile encoders' embeddings."""

_DIGEST_CHARS = 8

CoordsUnit = Literal["level0_px", "tile"]


@dataclass(frozen=True)
class SlideVector:
    """Definition of a slide embedding.

    Attributes:
        layer: Layer whose output is pooled, as in `LongNetViT.embed`.
        pooling: `cls` for the class token, `mean` for the mean of the tiles.
        tile_size: Side of a cell of the position grid in level-0 pixels, or `"patch"` for the side
            of the slide's tiles.
        coords_unit: `level0_px` for pixels, or `tile` for rows and columns of tiles.
        source: Software that computes such vectors.
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
        """Computes slide embeddings.

        Args:
            model: The slide encoder; its own pooling and tile size are ignored.
            x: Tile embeddings `(B, L, C)` or `(L, C)`.
            coords: `(B, L, 2)` or `(L, 2)`, x and y in `coords_unit`.
            patch_size_level0: Side of the tiles in level-0 pixels; required if `tile_size` is
                `"patch"`.
            padding_mask: bool `(B, L)`, true at padding.
            lengths: Number of tiles per slide, instead of a mask.

        Returns:
            `(B, D)`.

        Raises:
            ValueError: If `patch_size_level0` is required and missing, or `LongNetViT.forward`
                rejects the input.

        Example:
            >>> model = slide_encoder.create_model("", "gigapath_slide_enc12l384d", in_chans=384)
            >>> coords = 512 * torch.arange(40).reshape(20, 2)
            >>> with torch.no_grad():
            ...     get_preset("mean").embed(model, torch.zeros(20, 384), coords, 512).shape
            torch.Size([1, 384])
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
            # Tile numbers may be stored as int16 or int32, in which the product would overflow.
            coords = (coords if coords.is_floating_point() else coords.long()) * tile_size
        return model.embed(
            x, coords, self.layer, self.pooling, padding_mask, lengths, tile_size=tile_size
        )


PRESETS: dict[str, SlideVector] = {
    "mean": SlideVector(
        "final", "mean", "patch", source="`global_pool=True`; the class token was not trained"
    ),
    "pipeline": SlideVector(12, "cls", source="`last_layer_embed` of the published pipeline"),
    "trident": SlideVector(11, "mean", "patch", source="TRIDENT, `gigapath` slide encoder"),
    "lazyslide": SlideVector("final", "cls", source="LazySlide; `slide_encoder(x, coords)`"),
}
"""Slide embeddings in use, for the released 12-layer encoder.

`mean` is recommended for new work. A cell of its position grid is one tile, as the authors advise,
so that the embedding does not depend on the scanner. The cells of `pipeline` and `lazyslide` are
256 level-0 pixels wide, which gives the same tissue different positions at 20x and 40x."""


def get_preset(name: str) -> SlideVector:
    """Returns the preset with this name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class SlideEncoderSpec:
    """Slide encoder and preset, as a plain value that can be sent to other processes.

    Attributes:
        pretrained: Weights, as for `slide_encoder.create_model`.
        model_arch: Architecture, as for `slide_encoder.create_model`.
        in_chans: Width of the tile embeddings.
        preset: A key of `PRESETS`.
        grid_px: Side of a cell of the position grid in level-0 pixels, `tile` for the side of the
            slide's tiles, or None for that of the preset.
        precision: `fp32`, `bf16` or `fp16`.
        name: First part of the name of the output folder; the preset follows.
        digest: SHA-256 of the weights; empty for random weights.
        seed: Seed of random weights.
        architecture: Settings of `model_arch` as JSON, for worker processes in which the
            architecture is not registered.
    """

    pretrained: str
    model_arch: str
    in_chans: int
    preset: str
    grid_px: int | Literal["tile"] | None
    precision: str
    name: str
    digest: str = ""
    seed: int = 0
    architecture: str = ""

    def vector(self) -> SlideVector:
        """Returns the preset with `grid_px` applied."""
        preset = get_preset(self.preset)
        if self.grid_px is None:
            return preset
        return replace(preset, tile_size="patch" if self.grid_px == "tile" else self.grid_px)

    def cell_px(self, size_level0: int) -> int:
        """Returns the side of a cell of the position grid in level-0 pixels."""
        tile_size = self.vector().tile_size
        return size_level0 if tile_size == "patch" else tile_size

    def attributes(self, size_level0: int) -> dict[str, Any]:
        """Attributes that describe the encoder in the file of a vector."""
        return {
            "encoder": self.name,
            "model_arch": self.model_arch,
            "weights_sha256": self.digest,
            "precision": self.precision,
            "preset": self.preset,
            "layer": self.vector().layer,
            "pooling": self.vector().pooling,
            "tile_size": self.cell_px(size_level0),
        }


def describe_slide_encoder(
    pretrained: str,
    in_chans: int,
    *,
    model_arch: str | None = None,
    preset: str = "mean",
    grid_px: int | Literal["tile"] | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> SlideEncoderSpec:
    """Finds the weights of a slide encoder and derives a unique name from their digest.

    Args:
        pretrained: `hf_hub:OWNER/NAME`, a file or folder of weights, or `random`.
        in_chans: Width of the tile embeddings.
        model_arch: Architecture; by default that of the encoder released for this `in_chans`.
        preset: A key of `PRESETS`.
        grid_px: See `SlideEncoderSpec`.
        precision: `fp32`, `bf16` or `fp16`.
        seed: Seed of random weights.

    Raises:
        FileNotFoundError: If the weights do not exist.
        ValueError: If the preset or architecture is unknown, or no encoder was released for this
            `in_chans`.
    """
    arch = model_arch or _ARCHITECTURE_OF.get(in_chans)
    if arch not in ARCHITECTURES:
        raise UnknownNameError(
            f"slide encoder: no architecture {model_arch!r} for tile embeddings of width "
            f"{in_chans}{did_you_mean(model_arch, ARCHITECTURES)}"
        )
    layer, depth = get_preset(preset).layer, int(ARCHITECTURES[arch]["depth"])
    if isinstance(layer, int) and layer > depth:
        raise ValueError(f"preset {preset}: takes layer {layer}, {arch} has {depth}")
    if pretrained in ("", RANDOM):
        name, pretrained, digest = f"random-{arch}-{seed}", "", ""
    else:
        path = slide_encoder.find_slide_weights(pretrained)
        digest = sha256_of(path)
        published = {HUB_NAME: "prov-gigapath", FLASH_HUB_NAME: "prov-gigapath-flash"}
        stem = path.stem if Path(pretrained).is_file() else Path(pretrained).name
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:60] or "encoder"
        name = published.get(pretrained, f"{stem}-{digest[:_DIGEST_CHARS]}")
    return SlideEncoderSpec(
        *(pretrained, arch, in_chans, preset, grid_px, precision, name, digest, seed),
        architecture=json.dumps(ARCHITECTURES[arch]),
    )


def open_slide_encoder(spec: SlideEncoderSpec, device: torch.device | str = "cpu") -> LongNetViT:
    """Builds the slide encoder of a spec, in evaluation mode."""
    if spec.architecture:
        ARCHITECTURES.setdefault(spec.model_arch, json.loads(spec.architecture))
    # Random weights must be the same in all worker processes, so they depend on the seed only.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = slide_encoder.create_model(spec.pretrained, spec.model_arch, spec.in_chans)
    return model.to(device).eval()


def check_slide(
    coords: NDArray[np.int64], size_level0: int, spec: SlideEncoderSpec, where: str
) -> None:
    """Checks that the tiles of a slide lie on the position grid of a slide encoder.

    Raises:
        EmbeddingError: If a tile lies outside the grid, or coordinates are not level-0 pixels.
    """
    cell = spec.cell_px(size_level0)
    places = onto_slide(torch.from_numpy(coords), cell)
    try:
        check_coords(places, cell, NUM_GRIDS, f"{where}: coords")
    except ValueError as error:
        raise EmbeddingError(str(error)) from error


def onto_slide(coords: Tensor, cell_px: int) -> Tensor:
    """Shifts the tiles of a slide so that none begins beyond the left or upper edge.

    The original's tiler centres its grid on the tissue, so the first row or column may begin up to
    half a tile outside the slide. Its slide encoder then wraps the negative index to a cell at the
    opposite end of the grid. Here all tiles are shifted by the same amount, which keeps rows and
    columns apart.

    Args:
        coords: int64 `(..., N, 2)`, left and top in level-0 pixels.
        cell_px: Side of a cell in level-0 pixels. Coordinates further outside are returned
            unchanged, so that later checks reject them.

    Example:
        >>> onto_slide(torch.tensor([[-100, 0], [156, 256]]), cell_px=256).tolist()
        [[0, 0], [256, 256]]
    """
    low = coords.amin(dim=-2, keepdim=True)
    over_edge = (low < 0) & (low > -cell_px)
    return torch.where(over_edge, coords - low, coords)


@torch.inference_mode()
def slide_vector(
    model: LongNetViT,
    features: NDArray[Any],
    coords: NDArray[np.int64],
    size_level0: int,
    spec: SlideEncoderSpec,
    where: str,
) -> NDArray[np.float32]:
    """Computes the embedding of one slide.

    Args:
        model: The slide encoder.
        features: Tile embeddings `(N, in_chans)`.
        coords: int64 `(N, 2)`, left and top in level-0 pixels, in any order.
        size_level0: Side of a tile in level-0 pixels.
        spec: Preset, grid and precision.
        where: Name of the slide, for error messages.

    Returns:
        float32 `(embed_dim,)`.

    Raises:
        EmbeddingError: If there are no tiles, shapes do not fit, values are not finite, or tiles
            lie outside the grid.
    """
    check_features(features, coords, where, width=spec.in_chans)
    check_slide(coords, size_level0, spec, where)
    # Row by row, as in pretraining: dilated attention depends on the order of the tiles (shuffled,
    # the cosine to the sorted result is 0.986 at 1500 tiles).
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    device = model.cls_token.device
    x = torch.from_numpy(np.asarray(features, np.float32)[order]).to(device)
    places = onto_slide(torch.from_numpy(coords[order]), spec.cell_px(size_level0)).to(device)
    with autocast(spec.precision, device):
        vector = spec.vector().embed(model, x, places, patch_size_level0=size_level0)
    found: NDArray[np.float32] = vector[0].float().cpu().numpy()
    if not np.isfinite(found).all():
        raise EmbeddingError(
            f"{where}: its vector holds values that are not finite; computed in {spec.precision}, "
            "try bf16 or fp32"
        )
    return found


def write_slide_vector(
    path: StrPath, vector: NDArray[np.float32], attributes: Mapping[str, Any]
) -> None:
    """Writes a slide embedding as dataset `features` `(embed_dim,)`, as TRIDENT does.

    Attributes of the dataset record encoder, weights, layer, pooling and grid.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, h5py.File(partial, "w") as file:
        file.create_dataset("features", data=vector).attrs.update(attributes)
