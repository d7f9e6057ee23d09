"""Encodes a whole slide for the scale-invariant connector: a map of the slide, and every tile.

The connector takes a thumbnail and any number of sub-images. For a slide whose tiles have been
encoded to features, the *thumbnail* is a map: the tile tokens averaged within the cells of a grid
over the tissue, plus one token for the whole slide. The *sub-images* are the tiles, one token each.
The language model sees a fixed number of tokens regardless of the slide's size, while the
connector's cross-attention reaches all tiles; time and memory grow linearly with their number.

Shapes: B bags, N tiles of all bags together, D hidden size, G cells per side of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pallava.slide_bags import SlideBag
from pathcore.encoders.origin import TileOrigin

_LONGEST_WAVE = 10_000.0  # Vaswani et al. 2017, arXiv:1706.03762, section 3.5


@dataclass(frozen=True)
class SlideTokenConfig:
    """Sizes of `SlideTokenEncoder`.

    Args:
        in_features: Width of the tile features; 1536 for Prov-GigaPath
            (doi:10.1038/s41586-024-07441-w).
        hidden_size: Width D of the tokens and of the connector; a multiple of four.
        num_attention_heads: Number of attention heads of the connector.
        map_size: Number of cells G per side of the map.
        slide_embedding_features: Width of the slide encoder's embedding; 0 for none.
        tile_encoder: Encoder of the tile features, by its name in `pathcore.encoders`; empty to
            accept any of this width.
        patch_px: Side of a tile in pixels, as the tile encoder receives it; 0 to accept any.
        mpp: Micrometres per pixel of a tile; 0 to accept any.

    Raises:
        ValueError: If a size is below 1, or `hidden_size` is not a multiple of four.
    """

    in_features: int = 1536
    hidden_size: int = 768
    num_attention_heads: int = 12
    map_size: int = 14
    slide_embedding_features: int = 0
    tile_encoder: str = ""
    patch_px: int = 0
    mpp: float = 0.0

    @property
    def origin(self) -> TileOrigin:
        """Encoder and tiles that the features come from."""
        return TileOrigin(self.tile_encoder, self.patch_px, self.mpp)

    def __post_init__(self) -> None:
        for name in ("in_features", "hidden_size", "num_attention_heads", "map_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"slide tokens, {name}: expected at least 1, found {getattr(self, name)}"
                )
        if self.hidden_size % 4:
            raise ValueError(
                f"slide tokens, hidden_size {self.hidden_size}: expected a multiple of 4, a sine "
                "and a cosine for x and for y"
            )


class SlideTokenEncoder(nn.Module):
    """Maps bags of tile features to a map of each slide and one token per tile.

    A tile token is the projection of its normalised features plus a sine-cosine encoding of its
    position. Positions are in units of the tile side and relative to the top left corner of the
    tissue, because the position of the tissue on the glass carries no information.

    A cell token is the mean of its tiles, or a learned vector for an empty cell, plus the encoding
    of the cell's centre, plus a learned vector times `log(1 + num_tiles)`, which a mean does not
    reveal. The slide token is computed likewise from all tiles, plus the projected slide embedding
    if there is one.

    Args:
        fields: Fields of `SlideTokenConfig`.

    Example:
        >>> encoder = SlideTokenEncoder(in_features=6, hidden_size=8, map_size=2)
        >>> bags = [SlideBag(torch.randn(n, 6), torch.rand(n, 2) * 9) for n in (3, 50)]
        >>> slide_map, tiles, counts = encoder.visual_tokens(bags)
        >>> slide_map.shape, tiles.shape, counts
        (torch.Size([2, 5, 8]), torch.Size([53, 1, 8]), [3, 50])
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = SlideTokenConfig(**fields)
        width = self.config.hidden_size
        self.projection = _linear(self.config.in_features, width)
        self.slide_token = nn.Parameter(torch.randn(width) * 0.02)
        self.empty_cell = nn.Parameter(torch.randn(width) * 0.02)
        self.number_of_tiles = nn.Parameter(torch.randn(width) * 0.02)
        if self.config.slide_embedding_features:
            self.embedding_projection = _linear(self.config.slide_embedding_features, width)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.projection.weight.dtype

    @property
    def num_tokens(self) -> int:
        """Number of tokens per slide that the language model sees: map cells and slide token."""
        return self.config.map_size**2 + 1

    def visual_tokens(self, bags: Sequence[SlideBag]) -> tuple[Tensor, Tensor, list[int]]:
        """Computes the connector's inputs for a batch of bags, packed without padding.

        Args:
            bags: B bags of any size, on any device.

        Returns:
            The maps `(B, 1 + G * G, D)` with the slide token first, the tile tokens `(N, 1, D)`,
            and the number of tiles per bag.

        Raises:
            ValueError: If a bag is empty, has features of another width, or lacks the slide
                embedding that this encoder expects.
        """
        self._check(bags)
        device = self.projection.weight.device
        counts = [len(bag.features) for bag in bags]
        content = self._project(torch.cat([bag.features.to(device) for bag in bags]))
        places = [bag.positions.to(device, torch.float32) for bag in bags]
        frames = torch.stack([bag.extent().to(device, torch.float32) for bag in bags])
        origins, extents = frames[:, 0], frames[:, 1] - frames[:, 0] + 1
        bag_of_tile = torch.repeat_interleave(
            torch.arange(len(bags), device=device), torch.tensor(counts, device=device)
        )
        places_in_tissue = torch.cat(places) - origins[bag_of_tile]
        cells = (places_in_tissue + 0.5) / extents[bag_of_tile] * self.config.map_size
        cells = cells.long().clamp_(0, self.config.map_size - 1)
        tiles = content + encode_positions(places_in_tissue, content.shape[1]).to(content.dtype)
        slide_map = torch.cat(
            [
                self._slide_tokens(content, bag_of_tile, bags)[:, None],
                self._cell_tokens(content, bag_of_tile, cells, extents),
            ],
            dim=1,
        )
        return slide_map, tiles[:, None], counts

    def blank(self) -> SlideBag:
        """Returns a dummy one-tile bag.

        With it, text-only batches still give these parameters a (zero) gradient, as DDP requires.
        """
        weight, width = self.projection.weight, self.config.slide_embedding_features
        embedding = weight.new_zeros(width) if width else None
        features = weight.new_zeros(1, self.config.in_features)
        return SlideBag(features, weight.new_zeros(1, 2, dtype=torch.float32), embedding)

    def _check(self, bags: Sequence[SlideBag]) -> None:
        width, embedding_width = self.config.in_features, self.config.slide_embedding_features
        for number, bag in enumerate(bags):
            shape = tuple(bag.features.shape)
            if len(shape) != 2 or shape[1] != width or not shape[0]:
                raise ValueError(
                    f"bag {number}: expected features (N, {width}) with at least one tile, "
                    f"found {shape}"
                )
            if tuple(bag.positions.shape) != (shape[0], 2):
                raise ValueError(
                    f"bag {number}: positions {tuple(bag.positions.shape)}, ({shape[0]}, 2) "
                    "expected"
                )
            found = None if bag.slide_embedding is None else bag.slide_embedding.numel()
            if embedding_width and found != embedding_width:
                raise ValueError(
                    f"bag {number}: expected a slide embedding of width {embedding_width}, "
                    f"found {found}"
                )

    def _project(self, features: Tensor) -> Tensor:
        normalised = F.layer_norm(features.float(), features.shape[-1:])
        return self.projection(normalised.to(self.dtype))

    def _slide_tokens(
        self, content: Tensor, bag_of_tile: Tensor, bags: Sequence[SlideBag]
    ) -> Tensor:
        means, numbers = _means(content, bag_of_tile, len(bags))
        tokens = means + self.slide_token + numbers * self.number_of_tiles
        if self.config.slide_embedding_features:
            embeddings = torch.stack(
                [bag.slide_embedding.to(means.device) for bag in bags]  # type: ignore[union-attr]
            ).float()
            normalised = F.layer_norm(embeddings, embeddings.shape[-1:]).to(self.dtype)
            tokens = tokens + self.embedding_projection(normalised)
        return tokens.to(content.dtype)

    def _cell_tokens(
        self, content: Tensor, bag_of_tile: Tensor, cells: Tensor, extents: Tensor
    ) -> Tensor:
        side, num_bags = self.config.map_size, len(extents)
        index = (bag_of_tile * side + cells[:, 1]) * side + cells[:, 0]
        means, numbers = _means(content, index, num_bags * side**2)
        means = torch.where(numbers > 0, means, self.empty_cell.to(means.dtype))
        tokens = (means + numbers * self.number_of_tiles).view(num_bags, side**2, -1)
        steps = (torch.arange(side, device=content.device) + 0.5) / side
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        centres = torch.stack([columns, rows], dim=-1).view(1, -1, 2) * extents[:, None] - 0.5
        return (tokens + encode_positions(centres, content.shape[1])).to(content.dtype)


def encode_positions(positions: Tensor, width: int) -> Tensor:
    """Encodes x and y with sines and cosines (Vaswani et al. 2017, applied to each axis).

    Args:
        positions: `(..., 2)`, x and y.
        width: Width of the encoding, a multiple of four.

    Returns:
        float32 `(..., width)`: `[sin x, cos x, sin y, cos y]`.

    Example:
        >>> encode_positions(torch.zeros(5, 2), width=8).shape
        torch.Size([5, 8])
    """
    steps = torch.arange(width // 4, device=positions.device, dtype=torch.float32)
    frequencies = _LONGEST_WAVE ** (-steps / (width // 4))
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """Returns a linear layer with outputs of unit variance for normalised inputs."""
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=in_features**-0.5)
    nn.init.zeros_(linear.bias)
    return linear


def _means(content: Tensor, index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Returns float32 group means `(num_groups, D)` and `log(1 + size)` `(num_groups, 1)`."""
    sums = content.new_zeros(num_groups, content.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, index, content.float())
    sizes = torch.bincount(index, minlength=num_groups)[:, None].float()
    return sums / sizes.clamp(min=1), sizes.log1p()
