"""The LongNet encoder: pre-norm layers with dilated attention, over sequences without padding.

LongNet (arXiv:2307.02486) as in the released GigaPath weights: a LayerNorm before the output
projection of the attention and of the feed-forward part (Magneto, arXiv:2210.06423), no positions
of its own. Sequences of a batch follow each other in one row of tokens, so nothing is spent on
padding and no token can see another slide. Names and shapes of parameters are the released ones.

Shapes: T tokens of all sequences together, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gigapath.dilated_attention import dilated_attention

LAYER_NORM_EPS = 1e-5
"""Of all norms inside the encoder, as in the released weights' configuration."""

CHUNK = 512
"""Tokens that go through the feed-forward part at once without gradients: they stay in the cache
and no hidden state of all tokens is ever held."""


def default_segment_lengths(
    max_wsi_size: int = 262144, tile_size: int = 256, count: int = 5
) -> tuple[int, ...]:
    """Segment lengths of the branches for slides of up to a size, as the original derives them.

    Powers of 2 at equal distances from 1024 tokens to the whole grid, rounded down: Prov-GigaPath,
    Methods, "LongNet". 1024, 5792, 32768, 185363 and 1048576 for the released weights.

    Args:
        max_wsi_size: Longer side of the largest slide in pixels at level 0.
        tile_size: Side of a tile in pixels at level 0.
        count: Number of branches.

    Raises:
        ValueError: The slide is smaller than a tile.
    """
    if max_wsi_size < tile_size or tile_size < 1:
        raise ValueError(f"max_wsi_size {max_wsi_size}: expected at least tile_size {tile_size}")
    last = int(math.log2((max_wsi_size // tile_size) ** 2))
    exponents = [10 + (last - 10) * step / max(1, count - 1) for step in range(count)]
    return tuple(int(2**exponent) for exponent in exponents)


@dataclass(frozen=True)
class LongNetConfig:
    """What shapes a LongNet encoder.

    Attributes:
        embed_dim: Width.
        depth: Number of layers.
        num_heads: Heads of each layer.
        mlp_ratio: Width of the feed-forward part in widths.
        segment_lengths: Tokens of a segment, by branch.
        dilated_ratios: Distance of the tokens that see each other, by branch.
        dropout: Of the embedding, the attention's and the feed-forward part's output.
        drop_path_rate: Chance that the last layer is left out in training; from 0 upwards.
    """

    embed_dim: int
    depth: int
    segment_lengths: tuple[int, ...]
    dilated_ratios: tuple[int, ...] = (1, 2, 4, 8, 16)
    num_heads: int = 16
    mlp_ratio: float = 4.0
    dropout: float = 0.25
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim}: no multiple of {self.num_heads} heads")
        if len(self.segment_lengths) != len(self.dilated_ratios):
            raise ValueError(
                f"segment_lengths {self.segment_lengths} and dilated_ratios "
                f"{self.dilated_ratios}: expected equally many"
            )


class DilatedSelfAttention(nn.Module):
    """Projections around dilated attention.

    Args:
        config: The encoder's.
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.config = config
        self.backend: str | None = None
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Maps `(T, D)`, sequences of these lengths, to the same."""
        projected = [
            projection(tokens).unflatten(-1, (self.config.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed, start = [], 0
        for length, run in groupby(lengths):
            count = len(list(run))
            stop = start + count * length
            query, key, value = (
                tensor[start:stop].unflatten(0, (count, length)) for tensor in projected
            )
            attended = dilated_attention(
                query,
                key,
                value,
                self.config.segment_lengths,
                self.config.dilated_ratios,
                self.backend,
            )
            mixed.append(attended.flatten(2).flatten(0, 1))
            start = stop
        del projected, query, key, value
        joined = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        output: Tensor = self.out_proj(self.inner_attn_ln(joined))
        return output


class FeedForward(nn.Module):
    """Two linear maps with GELU and a norm between them.

    Args:
        config: The encoder's.
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps `(T, D)` to the same."""
        # GELU of half precision is computed in float32 inside, as the original does by casting.
        output: Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(tokens))))
        return output


class EncoderLayer(nn.Module):
    """Attention and feed-forward part, each after a norm and added to its input.

    Args:
        config: The encoder's.
        index: Number of the layer.
    """

    def __init__(self, config: LongNetConfig, index: int) -> None:
        super().__init__()
        self.drop_path = config.drop_path_rate * index / max(1, config.depth - 1)
        self.self_attn = DilatedSelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.ffn = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Maps `(T, D)` to the same; without gradients it may work in place."""
        if not torch.is_grad_enabled() and not self.training:
            return self._infer(tokens, lengths)
        update = self.dropout(self.self_attn(self.self_attn_layer_norm(tokens), lengths))
        tokens = tokens + self._drop_sequences(update, lengths)
        update = self.dropout(self.ffn(self.final_layer_norm(tokens)))
        return tokens + self._drop_sequences(update, lengths)

    def _infer(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        tokens += self.self_attn(self.self_attn_layer_norm(tokens), lengths)
        for rows in tokens.split(CHUNK if tokens.device.type == "cpu" else 64 * CHUNK):
            rows += self.ffn(self.final_layer_norm(rows))
        return tokens

    def _drop_sequences(self, update: Tensor, lengths: Sequence[int]) -> Tensor:
        """Stochastic depth, arXiv:1603.09382: leaves the update out for some sequences."""
        if not self.training or not self.drop_path:
            return update
        keep = 1.0 - self.drop_path
        kept = torch.rand(len(lengths), device=update.device) < keep
        factors = kept.to(update.dtype).div_(keep)
        repeats = torch.tensor(lengths, device=update.device)
        return update * factors.repeat_interleave(repeats).unsqueeze(-1)


class LongNetEncoder(nn.Module):
    """Layers of dilated attention, and a norm.

    Args:
        config: What shapes it.
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config, index) for index in range(config.depth))
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.grad_checkpointing = False

    def set_attention_backend(self, name: str | None) -> None:
        """Sets the backend of all layers, a name of `attention_backends.BACKENDS`."""
        for module in self.modules():
            if isinstance(module, DilatedSelfAttention):
                module.backend = name

    def hidden_states(self, tokens: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
        """Yields `(T, D)` before the first layer and after each.

        Without gradients, the next state may take the place of the last: use it before going on.

        Args:
            tokens: `(T, D)`, the sequences one after the other; may be overwritten.
            lengths: Tokens of each sequence.
        """
        tokens = self.dropout(tokens)
        yield tokens
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(layer, tokens, lengths, use_reentrant=False)
            else:
                tokens = layer(tokens, lengths)
            yield tokens

    def forward(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Returns `(T, D)` after the last layer and the encoder's norm."""
        for state in self.hidden_states(tokens, lengths):
            last = state
        output: Tensor = self.layer_norm(last)
        return output
