"""LongNet slide encoder: maps tile embeddings and their coordinates to slide embeddings.

Prov-GigaPath (doi:10.1038/s41586-024-07441-w), Methods. Functions, arguments and parameters have
their published names, and the released weights load unchanged.

Shapes: B slides, L tiles of the longest slide, D width of the encoder, C width of a tile embedding,
T tokens of all slides together, where each slide's class token precedes its tiles.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from timm.models import register_model
from torch import Tensor, nn

from gigapath.longnet import LongNetConfig, LongNetEncoder, default_segment_lengths
from gigapath.pos_embed import (
    OutOfGrid,
    axis_table,
    check_coords,
    embed_positions,
)
from pathcore.files import StrPath
from pathcore.names import UnknownNameError, did_you_mean
from pathcore.weights import check_finite, check_names, read_state_dict

HUB_PREFIX = "hf_hub:"
FILE_NAMES = ("slide_encoder.pth", "slide_encoder.safetensors")
"""Name of the released file, and of the same tensors as safetensors."""

FINAL_NORM_EPS = 1e-6
"""Epsilon of the norm after pooling in the released configuration; PyTorch's default is 1e-5."""

Padding = Literal["masked", "ignored"]
Pooling = Literal["cls", "mean"]
Layer = int | Literal["final"]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gigapath_slide_enc12l768d": {"embed_dim": 768, "depth": 12},
    "gigapath_slide_enc24l1024d": {"embed_dim": 1024, "depth": 24},
    "gigapath_slide_enc12l1536d": {"embed_dim": 1536, "depth": 12},
    "gigapath_slide_enc12l384d": {"embed_dim": 384, "depth": 12},
}
"""Arguments of `LongNetViT` by architecture name. The last published size is GigaPath-Flash's,
which takes the 384-wide embeddings of its ViT-S/16 tile encoder."""


def register_architecture(name: str, **settings: Any) -> None:
    """Registers an architecture for `create_model`.

    Args:
        name: Name of the architecture.
        **settings: Arguments of `LongNetViT`, at least `embed_dim` and `depth`.

    Raises:
        ValueError: If the name is registered with other settings.
    """
    if ARCHITECTURES.get(name, settings) != settings:
        raise ValueError(f"architecture {name!r} is registered with {ARCHITECTURES[name]}")
    ARCHITECTURES[name] = dict(settings)


class PatchEmbed(nn.Module):
    """Projects tile embeddings to the width of the encoder."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_chans, embed_dim)

    def forward(self, tiles: Tensor) -> Tensor:
        """Maps `(..., C)` to `(..., D)`."""
        projected: Tensor = self.proj(tiles)
        return projected


class LongNetViT(nn.Module):
    """LongNet over a class token and the tiles of a slide, with sine-cosine positions.

    Args:
        in_chans: Width C of the tile embeddings.
        embed_dim: Width D of the encoder; a multiple of 4.
        depth: Number of layers.
        slide_ngrids: Number of grid cells along each axis.
        tile_size: Side of a grid cell in level-0 pixels; may be changed later.
        max_wsi_size: Longest side of the largest slide in level-0 pixels; together with `tile_size`
            it determines the segment lengths.
        global_pool: Whether to pool the mean of the tiles instead of the class token.
        dropout: Dropout of the embedding and of the two branches of each layer.
        drop_path_rate: Probability of dropping the last layer in training; rises linearly from 0
            at the first layer.
        num_heads: Number of attention heads.
        mlp_ratio: Width of the feed-forward network relative to D.
        segment_lengths: Tokens per segment of each attention branch; by default derived from
            `max_wsi_size`.
        dilated_ratios: Dilation of each attention branch.
        padding: `"masked"`: tiles do not attend to padding, so the embedding of a slide does not
            depend on its batch. `"ignored"`: padding counts as tiles, as in the original.
        out_of_grid: `"error"`: raise for coordinates beyond the grid. `"original"`: silently give
            them the position of another cell, as in the original.
        check_inputs: Whether to check for non-finite values and implausible coordinates.

    Attributes:
        embed_dim: Width D of the encoder.
        in_chans: Width C of the tile embeddings.

    Example:
        >>> model = LongNetViT(in_chans=384, embed_dim=64, depth=2, num_heads=4).eval()
        >>> x, coords = torch.zeros(3, 50, 384), 256 * torch.arange(300).reshape(3, 50, 2)
        >>> with torch.no_grad():
        ...     layers = model(x, coords, all_layer_embed=True, lengths=[50, 20, 35])
        ...     tiles = model.tokens(x, coords, lengths=[50, 20, 35])
        >>> len(layers), layers[-1].shape, tiles.shape
        (3, torch.Size([3, 64]), torch.Size([3, 50, 64]))
    """

    pos_axis: Tensor

    def __init__(
        self,
        in_chans: int = 1536,
        embed_dim: int = 768,
        depth: int = 12,
        slide_ngrids: int = 1000,
        tile_size: int = 256,
        max_wsi_size: int = 262144,
        global_pool: bool = False,
        dropout: float = 0.25,
        drop_path_rate: float = 0.1,
        *,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        segment_lengths: Sequence[int] | None = None,
        dilated_ratios: Sequence[int] = (1, 2, 4, 8, 16),
        padding: Padding = "masked",
        out_of_grid: OutOfGrid = "error",
        check_inputs: bool = True,
    ) -> None:
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim {embed_dim}: expected a multiple of 4")
        for name, value, choices in (
            ("padding", padding, ("masked", "ignored")),
            ("out_of_grid", out_of_grid, ("error", "original")),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(choices)}")
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.tile_size, self.slide_ngrids = tile_size, slide_ngrids
        self.global_pool, self.check_inputs = global_pool, check_inputs
        self.padding, self.out_of_grid = padding, out_of_grid
        config = LongNetConfig(
            embed_dim=embed_dim,
            depth=depth,
            segment_lengths=tuple(
                segment_lengths or default_segment_lengths(max_wsi_size, tile_size)
            ),
            dilated_ratios=tuple(dilated_ratios),
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            drop_path_rate=drop_path_rate,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        self.encoder = LongNetEncoder(config)
        self.norm = nn.LayerNorm(embed_dim, eps=FINAL_NORM_EPS)
        # Not persistent, because the released weights do not contain positions.
        table = axis_table(slide_ngrids, embed_dim // 2)
        self.register_buffer("pos_axis", table, persistent=False)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.encoder.config.depth

    def init_weights(self) -> None:
        """Initialises weights by Xavier uniform and biases with zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.cls_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether layers are recomputed in the backward pass to save activation memory."""
        self.encoder.grad_checkpointing = enable

    def forward(
        self,
        x: Tensor,
        coords: Tensor,
        all_layer_embed: bool = False,
        padding_mask: Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Computes slide embeddings.

        Args:
            x: Tile embeddings `(B, L, C)`; `(L, C)` is a batch of one.
            coords: `(B, L, 2)` or `(L, 2)`, x and y in level-0 pixels.
            all_layer_embed: Whether to return the embedding after every layer.
            padding_mask: `(B, L)`, true for padding, which must follow the tiles of a slide.
            lengths: Number of tiles per slide, in place of a mask.

        Returns:
            `(1, B, D)`, where the original returns a list of one tensor; `[0]` and `.squeeze()`
            work for both. With `all_layer_embed`, a list of depth + 1 tensors `(B, D)`: the pooled
            input embedding and the pooled state after each layer. They skip the encoder's final
            norm, so the last one differs from the default output.

        Raises:
            ValueError: If shapes do not fit each other or the model, values are not finite, or
                coordinates lie outside the grid.
        """
        tokens, sizes = self._embed(x, coords, padding_mask, lengths)
        pooling: Pooling = "mean" if self.global_pool else "cls"
        vectors = []
        state = tokens
        for state in self.encoder.hidden_states(tokens, sizes):
            if all_layer_embed:
                vectors.append(self.norm(_pool(state, sizes, pooling)))
        if all_layer_embed:
            return vectors
        return self._pooled("final", state, sizes, pooling).unsqueeze(0)

    def embed(
        self,
        x: Tensor,
        coords: Tensor,
        layer: Layer = "final",
        pooling: Pooling = "mean",
        padding_mask: Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        tile_size: int | None = None,
    ) -> Tensor:
        """Computes slide embeddings from the output of a layer, without running later ones.

        Args:
            x: Tile embeddings `(B, L, C)` or `(L, C)`.
            coords: `(B, L, 2)` or `(L, 2)`, x and y in level-0 pixels.
            layer: 0 for the input embedding or i for the state after layer i, both without the
                encoder's final norm; `"final"` for the last state, with that norm. The pooled
                vector is always normalised.
            pooling: `"cls"` for the class token, `"mean"` for the mean of the tiles.
            padding_mask: See `forward`.
            lengths: See `forward`.
            tile_size: Side of a grid cell in level-0 pixels; by default that of the model.

        Returns:
            `(B, D)`.

        Raises:
            ValueError: If the layer or pooling is unknown, or `forward` would reject the inputs.
        """
        state, sizes = self._state(x, coords, layer, padding_mask, lengths, tile_size)
        return self._pooled(layer, state, sizes, pooling)

    def tokens(
        self,
        x: Tensor,
        coords: Tensor,
        layer: Layer = "final",
        padding_mask: Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        with_cls: bool = False,
    ) -> Tensor:
        """Computes the hidden state of each tile after a layer.

        Args:
            x: Tile embeddings `(B, L, C)` or `(L, C)`.
            coords: `(B, L, 2)` or `(L, 2)`, x and y in level-0 pixels.
            layer: See `embed`.
            padding_mask: See `forward`.
            lengths: See `forward`.
            with_cls: Whether to prepend the class token.

        Returns:
            `(B, L, D)`, or `(B, 1 + L, D)` with the class token. Padding tokens are zero. Only the
            layer `"final"` is normalised, by the encoder's final norm.

        Raises:
            ValueError: If the layer does not exist, or `forward` would reject the inputs.
        """
        state, sizes = self._state(x, coords, layer, padding_mask, lengths)
        if layer == "final":
            state = self.encoder.layer_norm(state)
        sequences = [part if with_cls else part[1:] for part in state.split(sizes)]
        padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        missing = x.shape[-2] + with_cls - padded.shape[1]
        return nn.functional.pad(padded, (0, 0, 0, missing))

    def _pooled(self, layer: Layer, state: Tensor, sizes: list[int], pooling: Pooling) -> Tensor:
        # The encoder's norm acts on tokens, the norm of this class on pooled vectors. For the class
        # token the order does not matter, and normalising a single token is cheaper.
        if layer != "final":
            vectors = _pool(state, sizes, pooling)
        elif pooling == "cls":
            vectors = self.encoder.layer_norm(_pool(state, sizes, pooling))
        else:
            vectors = _pool(self.encoder.layer_norm(state), sizes, pooling)
        normed: Tensor = self.norm(vectors)
        return normed

    def _state(
        self,
        x: Tensor,
        coords: Tensor,
        layer: Layer,
        padding_mask: Tensor | None,
        lengths: Sequence[int] | Tensor | None,
        tile_size: int | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Returns the state after a layer `(T, D)` and the number of tokens of each slide."""
        index = self.depth if layer == "final" else layer
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= self.depth:
            raise ValueError(f"layer {layer!r}: expected 0 to {self.depth} or 'final'")
        tokens, sizes = self._embed(x, coords, padding_mask, lengths, tile_size)
        states = self.encoder.hidden_states(tokens, sizes)
        for _ in range(index + 1):
            state = next(states)
        return state, sizes

    def _embed(
        self,
        x: Tensor,
        coords: Tensor,
        padding_mask: Tensor | None,
        lengths: Sequence[int] | Tensor | None,
        tile_size: int | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Returns the embedded tokens of all slides `(T, D)` and the number of tokens of each.

        Slides are packed one after the other, so that no attention is spent on padding.
        """
        x, coords = _batched(x, coords, self.in_chans)
        tiles = _slide_lengths(x, padding_mask, lengths)
        tile_size = self.tile_size if tile_size is None else tile_size
        if self.check_inputs:
            self._check(x, coords, tiles, tile_size)
        if self.padding == "ignored":
            tiles = [x.shape[1]] * len(x)
        if all(count == x.shape[1] for count in tiles):
            packed, places = x.flatten(0, 1), coords.flatten(0, 1)
        else:
            packed = torch.cat([slide[:count] for slide, count in zip(x, tiles, strict=True)])
            places = torch.cat([slide[:count] for slide, count in zip(coords, tiles, strict=True)])
        weight = self.patch_embed.proj.weight
        embedded = self.patch_embed(packed.to(weight.dtype))
        positions = embed_positions(places, self.pos_axis, tile_size, self.out_of_grid)  # type: ignore[arg-type]
        if not torch.is_autocast_enabled(embedded.device.type):
            positions = positions.to(embedded.dtype)
        # Under autocast positions stay float32, and with them the sum and the residual stream.
        embedded = embedded + positions
        cls_token = self.cls_token[0].to(embedded.dtype)
        pieces = [piece for slide in embedded.split(tiles) for piece in (cls_token, slide)]
        return torch.cat(pieces), [count + 1 for count in tiles]

    def _check(self, x: Tensor, coords: Tensor, tiles: list[int], tile_size: int) -> None:
        for number, count in enumerate(tiles):
            slide = f" of slide {number}" if len(tiles) > 1 else ""
            # Row sums are one cheap pass; elements are checked only if a sum is not finite.
            finite = torch.isfinite(x[number, :count].sum(-1))
            if not bool(finite.all()):
                finite = torch.isfinite(x[number, :count]).all(-1)
            if not bool(finite.all()):
                index = int((~finite).nonzero()[0, 0])
                raise ValueError(
                    f"x{slide}: the embedding of tile {index} holds values that are not finite "
                    f"({int((~finite).sum())} of {count} tiles)"
                )
            if self.out_of_grid == "error":
                check_coords(coords[number, :count], tile_size, self.slide_ngrids, f"coords{slide}")


def _batched(x: Tensor, coords: Tensor, in_chans: int) -> tuple[Tensor, Tensor]:
    """Checks shapes and adds a batch dimension to a single slide.

    Raises:
        ValueError: If the shapes do not fit, or there are no tiles.
    """
    if x.dim() not in (2, 3) or x.shape[-1] != in_chans:
        raise ValueError(f"x {tuple(x.shape)}: expected (B, L, {in_chans}) or (L, {in_chans})")
    if coords.shape != (*x.shape[:-1], 2):
        expected = (*x.shape[:-1], 2)
        raise ValueError(
            f"coords {tuple(coords.shape)}: expected {expected} for x {tuple(x.shape)}"
        )
    if not x.shape[:-1].numel():
        raise ValueError(f"x {tuple(x.shape)}: no tiles; skip slides without tissue")
    return (x, coords) if x.dim() == 3 else (x.unsqueeze(0), coords.unsqueeze(0))


def _slide_lengths(
    x: Tensor, padding_mask: Tensor | None, lengths: Sequence[int] | Tensor | None
) -> list[int]:
    """Returns the number of tiles of each slide.

    Raises:
        ValueError: If both a mask and lengths are given, shapes differ, tiles follow padding, or a
            slide has no tiles.
    """
    batch, longest = x.shape[:2]
    if padding_mask is not None and lengths is not None:
        raise ValueError("padding_mask and lengths: give one of them")
    if padding_mask is not None:
        if padding_mask.shape not in {(batch, longest), (longest,)} or (
            padding_mask.dim() == 1 and batch != 1
        ):
            raise ValueError(
                f"padding_mask {tuple(padding_mask.shape)}: expected {(batch, longest)}"
            )
        real = ~padding_mask.bool().reshape(batch, longest)
        if bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ValueError(
                "padding_mask: tiles follow padding; it must be true for padding, which comes "
                "after the tiles of a slide"
            )
        lengths = real.sum(1)
    if lengths is None:
        return [longest] * batch
    counts = [int(count) for count in lengths]
    if len(counts) != batch:
        raise ValueError(f"lengths: {len(counts)} numbers for {batch} slides")
    for number, count in enumerate(counts):
        if not 1 <= count <= longest:
            raise ValueError(f"slide {number} has {count} tiles: expected 1 to {longest}")
    return counts


def _pool(state: Tensor, sizes: Sequence[int], pooling: Pooling) -> Tensor:
    """Pools the packed tokens `(T, D)` of slides with `sizes` tokens each to `(B, D)`."""
    if pooling == "cls":
        return torch.stack([slide[0] for slide in state.split(list(sizes))])
    if pooling == "mean":
        return torch.stack([slide[1:].mean(0) for slide in state.split(list(sizes))])
    raise ValueError(f"pooling {pooling!r}: expected 'cls' or 'mean'")


def find_slide_weights(pretrained: StrPath, local_dir: StrPath | None = None) -> Path:
    """Finds the weights of a slide encoder and downloads them if they are not cached.

    Args:
        pretrained: `hf_hub:OWNER/NAME`, optionally with `@REVISION`; a file; or a folder with
            `slide_encoder.pth` or `slide_encoder.safetensors`.
        local_dir: Folder to search before the hub, as the original code downloads the file there;
            also the cache folder of the hub. By default the usual cache (`HF_HOME`,
            `HF_HUB_CACHE`).

    Raises:
        FileNotFoundError: If the weights do not exist or cannot be downloaded.
    """
    name = os.fspath(pretrained)
    if not name.startswith(HUB_PREFIX):
        path = Path(name).expanduser()
        if path.is_dir():
            if found := _in_folder(path):
                return found
            raise FileNotFoundError(f"{path}: holds neither {' nor '.join(FILE_NAMES)}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected slide encoder weights, a folder with them, or "
                f"{HUB_PREFIX}OWNER/NAME. For random weights pass ''"
            )
        return path
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    # A file in a plain folder does not say which revision it is.
    if local_dir is not None and not revision and (found := _in_folder(Path(local_dir))):
        return found
    try:
        return Path(
            hf_hub_download(
                repository,
                FILE_NAMES[0],
                revision=revision or None,
                cache_dir=None if local_dir is None else Path(local_dir),
            )
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: {FILE_NAMES[0]} is neither in the local cache nor could it be downloaded "
            f"({type(error).__name__}: {error}). Accept the terms at "
            f"https://huggingface.co/{repository} and set HF_TOKEN, or give the path of a "
            "downloaded file"
        ) from error


def _in_folder(folder: Path) -> Path | None:
    return next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)


def create_model(
    pretrained: StrPath,
    model_arch: str,
    in_chans: int,
    local_dir: StrPath | None = None,
    **kwargs: Any,
) -> LongNetViT:
    """Creates a slide encoder in evaluation mode.

    The original returns models in training mode, where dropout makes every output different; call
    `.train()` for fine-tuning.

    Args:
        pretrained: `hf_hub:prov-gigapath/prov-gigapath`, a file or folder of weights, or `""` for
            random weights.
        model_arch: A name in `ARCHITECTURES`.
        in_chans: Width of the tile embeddings.
        local_dir: Folder with a downloaded `slide_encoder.pth`, or cache folder of the hub; by
            default the usual cache.
        **kwargs: Further arguments of `LongNetViT`.

    Raises:
        ValueError: If the architecture is unknown, or the weights do not fit. The message names the
            tensors that are missing, unexpected or of a different shape.
        FileNotFoundError: If the weights do not exist or cannot be downloaded.

    Example:
        >>> import torch
        >>> model = create_model("", "gigapath_slide_enc12l384d", in_chans=384)
        >>> tile_embed, coords = torch.zeros(100, 384), 256 * torch.arange(200).reshape(100, 2)
        >>> with torch.no_grad():
        ...     model(tile_embed, coords).shape, model.embed(tile_embed, coords).shape
        (torch.Size([1, 1, 384]), torch.Size([1, 384]))
    """
    if model_arch not in ARCHITECTURES:
        hint = did_you_mean(model_arch, ARCHITECTURES)
        raise UnknownNameError(f"model_arch {model_arch!r}: no such slide encoder{hint}")
    settings = {**ARCHITECTURES[model_arch], **kwargs}
    path = find_slide_weights(pretrained, local_dir) if os.fspath(pretrained) else None
    # On the meta device, because PyTorch's initialisation takes longer than reading the weights.
    with torch.device("meta"):
        model = LongNetViT(in_chans=in_chans, **settings)
    if path is None:
        empty = {name: torch.empty(old.shape) for name, old in model.state_dict().items()}
        model.load_state_dict(empty, assign=True)
        model.init_weights()
        return model.eval()
    state = read_state_dict(path, mmap=True)
    check_names(
        model.state_dict(),
        state,
        what="slide encoder",
        source=path,
        hint=lambda state: _hint(state, model_arch, in_chans),
    )
    check_finite(state, path)
    # Copies, because the memory-mapped file may change while the model is in use.
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def _hint(state: Mapping[str, Tensor], model_arch: str, in_chans: int) -> str:
    """Returns a hint for an error message: the architecture that the weights belong to."""
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.dim() != 2:
        return ""
    width, channels = projection.shape
    prefix = "encoder.layers."
    layers = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
    names = [
        name
        for name, settings in ARCHITECTURES.items()
        if (settings["embed_dim"], settings["depth"]) == (width, len(layers))
    ]
    if not names or (model_arch in names and channels == in_chans):
        return ""
    return f" Its shapes are those of {' or '.join(names)} with in_chans {channels}"


def _create_by_timm(name: str, options: dict[str, Any]) -> LongNetViT:
    """Creates a randomly initialised slide encoder from the arguments of `timm.create_model`."""
    if options.pop("pretrained", False):
        raise ValueError(
            f"pretrained=True: {name} is not on timm's hub; use "
            'gigapath.slide_encoder.create_model("hf_hub:prov-gigapath/prov-gigapath", ...)'
        )
    for name_of_timm in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name_of_timm, None)
    in_chans = options.pop("in_chans", 1536)
    return create_model("", name, in_chans, **options).train()  # as every model of timm


# Functions, because the published code looks the sizes up in timm's registry and users import them.


@register_model
def gigapath_slide_enc12l768d(**kwargs: Any) -> LongNetViT:
    """Returns the slide encoder of Prov-GigaPath with random weights (86 M parameters)."""
    return _create_by_timm("gigapath_slide_enc12l768d", kwargs)


@register_model
def gigapath_slide_enc24l1024d(**kwargs: Any) -> LongNetViT:
    """Returns a deeper and wider slide encoder with random weights (304 M parameters)."""
    return _create_by_timm("gigapath_slide_enc24l1024d", kwargs)


@register_model
def gigapath_slide_enc12l1536d(**kwargs: Any) -> LongNetViT:
    """Returns a slide encoder as wide as its tile embeddings, with random weights (343 M)."""
    return _create_by_timm("gigapath_slide_enc12l1536d", kwargs)


@register_model
def gigapath_slide_enc12l384d(**kwargs: Any) -> LongNetViT:
    """Returns the slide encoder of GigaPath-Flash with random weights (21.5 M parameters)."""
    return _create_by_timm("gigapath_slide_enc12l384d", kwargs)
