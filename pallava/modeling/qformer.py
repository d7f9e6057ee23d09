"""Scale-invariant connector: thumbnail tokens attend to the tokens of all sub-images.

PA-LLaVA, section III-B (doi:10.1109/BIBM62325.2024.10821785). A BERT-like stack of post-norm layers
whose queries are the thumbnail's visual tokens. In the paper, each layer also cross-attends to the
tokens of all sub-images. The published code never built that cross-attention, so the released
weights have none: *released mode*, which ignores sub-images, reproduces them. The keys of a
checkpoint decide its mode.

Shapes: B images, T visual tokens per tile, D visual width, L language model's width,
N sub-images of all B images together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of the connector; the defaults are those of the released weights.

    Args:
        visual_hidden_size: Width D of the visual tokens.
        llm_hidden_size: Width L of the language model.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads per attention; not visible in a checkpoint's shapes.
        intermediate_size: Width of the feed-forward blocks.
        cross_attention: True for the connector of the paper, False for released mode.
        cross_attention_freq: Interval between layers with cross-attention to sub-images.
        depth: Number of linear layers in the final projection, with GELU in between.
        hidden_dropout_prob: Dropout after every dense layer.
        attention_probs_dropout_prob: Dropout of attention weights. The original trains with 0.1;
            with 0, SDPA need not store the weights (a third of the memory on a CPU).
        layer_norm_eps: Epsilon of every LayerNorm; BERT's value.

    Raises:
        ValueError: If a size is below 1, or heads do not divide the width.
    """

    visual_hidden_size: int = 768
    llm_hidden_size: int = 4096
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention: bool = True
    cross_attention_freq: int = 1
    depth: int = 1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "num_attention_heads", "cross_attention_freq", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"connector {name}: expected at least 1, found {getattr(self, name)}"
                )
        if self.visual_hidden_size % self.num_attention_heads:
            raise ValueError(
                f"connector visual_hidden_size {self.visual_hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )


class _AttentionWeights(nn.Module):
    """Query, key and value projections; BERT names this module `self`."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.visual_hidden_size
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)


class _Output(nn.Module):
    """Dense layer, dropout, residual and LayerNorm at the end of each BERT block."""

    def __init__(self, config: ConnectorConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.visual_hidden_size)
        self.LayerNorm = nn.LayerNorm(config.visual_hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class _Attention(nn.Module):
    """Multi-head self-attention of thumbnail tokens, or cross-attention to sub-image tokens."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.add_module("self", _AttentionWeights(config))
        self.output = _Output(config, config.visual_hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        sub_images: Tensor | None = None,
        groups: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Attends to `sub_images` `(N, T, D)` in `groups`, or to `hidden_states` without them.

        `groups` lists `(num_images, num_sub_images)` for runs of consecutive images in
        `hidden_states` `(B, T, D)` with equally many sub-images. Keys and values are projected once
        for all images and stay packed, so that no padding takes part in the attention.
        """
        weights: _AttentionWeights = self.get_submodule("self")  # type: ignore[assignment]
        query = weights.query(hidden_states)
        source = hidden_states if sub_images is None else sub_images
        key, value = weights.key(source), weights.value(source)
        if sub_images is None:
            context = self._attend(query, key, value)
        else:
            context = self._attend_in_groups(query, key, value, groups)
        return self.output(context, hidden_states)

    def _attend_in_groups(
        self, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[tuple[int, int]]
    ) -> Tensor:
        contexts, image, sub_image = [], 0, 0
        for num_images, count in groups:
            queries = query[image : image + num_images]
            image += num_images
            if count == 0:
                # Without sub-images the output is zero, as in the original. The projections stay in
                # the graph because DDP waits for a gradient of every parameter.
                unused = queries.sum() + key.sum() + value.sum()
                contexts.append(torch.zeros_like(queries) + 0.0 * unused)
                continue
            rows = slice(sub_image, sub_image + num_images * count)
            sub_image += num_images * count
            keys, values = (
                tensor[rows].reshape(num_images, -1, tensor.shape[-1]) for tensor in (key, value)
            )
            contexts.append(self._attend(queries, keys, values))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (
            tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tensor in (query, key, value)
        )
        dropout = self.dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2)


class _Intermediate(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.visual_hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden_states))


class _Layer(nn.Module):
    def __init__(self, config: ConnectorConfig, *, cross_attention: bool) -> None:
        super().__init__()
        self.attention = _Attention(config)
        if cross_attention:
            self.crossattention = _Attention(config)
        self.has_cross_attention = cross_attention
        self.intermediate_query = _Intermediate(config)
        self.output_query = _Output(config, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, sub_images: Tensor | None, groups: Sequence[tuple[int, int]]
    ) -> Tensor:
        hidden_states = self.attention(hidden_states)
        if self.has_cross_attention:
            hidden_states = self.crossattention(hidden_states, sub_images, groups)
        return self.output_query(self.intermediate_query(hidden_states), hidden_states)


class _Embeddings(nn.Module):
    """Holds the one BERT buffer that published checkpoints contain."""

    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(512).expand(1, -1))


class _LayerStack(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            _Layer(
                config,
                cross_attention=config.cross_attention and index % config.cross_attention_freq == 0,
            )
            for index in range(config.num_hidden_layers)
        )


class _Bert(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings()
        self.encoder = _LayerStack(config)


class _Projection(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Linear(config.visual_hidden_size, config.llm_hidden_size)]
        for _ in range(1, config.depth):
            modules += [nn.GELU(), nn.Linear(config.llm_hidden_size, config.llm_hidden_size)]
        self.model = nn.Sequential(*modules)


class _Connector(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.bert = _Bert(config)
        self.norm = nn.LayerNorm(config.visual_hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Projection(config)


class ScaleInvariantConnector(nn.Module):
    """Connector that maps a thumbnail and any number of sub-images to T tokens per image.

    Args:
        config: Sizes and mode.

    Example:
        >>> config = ConnectorConfig(visual_hidden_size=64, llm_hidden_size=32,
        ...                          num_hidden_layers=2, num_attention_heads=4)
        >>> connector = ScaleInvariantConnector(config)
        >>> connector(torch.randn(2, 9, 64), torch.randn(4 + 6, 9, 64), [4, 6]).shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = _Connector(config)
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # as in BERT's code (arXiv:1810.04805)
                nn.init.zeros_(module.bias)

    @property
    def uses_sub_images(self) -> bool:
        """Whether the output depends on sub-images; if not, they need not be encoded."""
        return self.config.cross_attention

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        thumbnails: Tensor,
        sub_images: Tensor | None = None,
        num_sub_images: Sequence[int] | None = None,
    ) -> Tensor:
        """Maps a batch of images to language model tokens.

        Args:
            thumbnails: `(B, T, D)` features of the thumbnails.
            sub_images: `(N, T, D)` features of all sub-images, image by image, without padding;
                unused in released mode.
            num_sub_images: Number of sub-images per image: B integers with sum N.

        Returns:
            `(B, T, L)`, regardless of the number of sub-images.

        Raises:
            ValueError: If sub-images are missing in scale-invariant mode, or the counts do not add
                up.
        """
        order, groups = list(range(len(thumbnails))), []
        if self.uses_sub_images:
            counts = self._check_counts(thumbnails, sub_images, num_sub_images)
            # Images with equally many sub-images become neighbours and share one attention call.
            order = sorted(order, key=lambda image: counts[image])
            groups = [(len(list(same)), c) for c, same in groupby(counts[i] for i in order)]
            sub_images = _reorder(sub_images, order, counts)
        is_sorted = order == list(range(len(order)))
        ordered = thumbnails if is_sorted else thumbnails[order]
        hidden_states = F.layer_norm(ordered, ordered.shape[-1:], eps=self.config.layer_norm_eps)
        hidden_states = self.embedding_dropout(hidden_states)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.model.bert.encoder.layer:
            if recompute:
                # Re-entrant checkpointing needs an input that requires grad, or the weights get no
                # gradient; inputs from a frozen encoder do not.
                hidden_states = checkpoint(
                    layer, hidden_states, sub_images, groups, use_reentrant=False
                )
            else:
                hidden_states = layer(hidden_states, sub_images, groups)
        tokens = self.model.mlp.model(self.model.norm(hidden_states + ordered))
        return tokens if is_sorted else tokens[_inverse(order)]

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes activations in the backward pass instead of storing them."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Stores the activations of every layer."""
        self.gradient_checkpointing = False

    def _check_counts(
        self, thumbnails: Tensor, sub_images: Tensor | None, num_sub_images: Sequence[int] | None
    ) -> list[int]:
        if sub_images is None or num_sub_images is None:
            raise ValueError(
                "a connector with cross-attention needs sub_images and num_sub_images; pass an "
                "empty (0, T, D) tensor and zeros for images without sub-images"
            )
        counts = [int(count) for count in num_sub_images]
        if len(counts) != len(thumbnails) or sum(counts) != len(sub_images):
            raise ValueError(
                f"num_sub_images {counts}: {len(thumbnails)} counts with sum {len(sub_images)} "
                "expected"
            )
        return counts


def connector_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the connector's tensors from a training checkpoint and strips their prefix."""
    prefix = "projector."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }


def _reorder(sub_images: Tensor | None, order: list[int], counts: list[int]) -> Tensor:
    assert sub_images is not None
    if order == sorted(order):
        return sub_images
    pieces = sub_images.split(counts)
    return torch.cat([pieces[image] for image in order])


def _inverse(order: list[int]) -> list[int]:
    inverse = [0] * len(order)
    for position, image in enumerate(order):
        inverse[image] = position
    return inverse
