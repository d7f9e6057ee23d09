"""LongNet encoder: pre-norm transformer layers with dilated attention over packed sequences.

LongNet (arXiv:2307.02486) as in the released GigaPath weights: with a LayerNorm before the output
projections of attention and feed-forward network (Magneto, arXiv:2210.06423), and without positions
of its own. The sequences of a batch are packed one after the other, so that no work is spent on
padding and no token attends to another slide. Parameters have the released names and shapes.

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
"""Epsilon of all norms in the encoder, as in the configuration of the released weights."""

CHUNK = 512
"""Number of tokens per call of the feed-forward network on a CPU without gradients: their hidden
states fit in the cache, and those of all tokens are never held at once."""


def default_segment_lengths(
    max_wsi_size: int = 262144, tile_size: int = 256, count: int = 5
) -> tuple[int, ...]:
    """Derives the segment lengths of the attention branches from the size of the largest slide.

    The lengths grow geometrically from 1024 tokens to the whole grid, rounded down (Prov-GigaPath,
    Methods, "LongNet").

    Args:
        max_wsi_size: Longest side of the largest slide in level-0 pixels.
        tile_size: Side of a tile in level-0 pixels.
        count: Number of branches.

    Raises:
        ValueError: If the slide is smaller than a tile.

    Example:
        >>> default_segment_lengths()  # of the released weights
        (1024, 5792, 32768, 185363, 1048576)
    """
    if max_wsi_size < tile_size or tile_size < 1:
        raise ValueError(f"max_wsi_size {max_wsi_size}: expected at least tile_size {tile_size}")
    last = int(math.log2((max_wsi_size // tile_size) ** 2))
    exponents = [10 + (last - 10) * step / max(1, count - 1) for step in range(count)]
    return tuple(int(2**exponent) for exponent in exponents)


@dataclass(frozen=True)
class LongNetConfig:
    """Configuration of a LongNet encoder.

    Attributes:
        embed_dim: D.
        depth: Number of layers.
        segment_lengths: Tokens per segment of each attention branch.
        dilated_ratios: Distance between tokens that attend to each other, of each branch.
        num_heads: Number of attention heads.
        mlp_ratio: Width of the feed-forward network relative to D.
        dropout: Dropout of the embedding and of the outputs of attention and feed-forward network.
        drop_path_rate: Probability of dropping the last layer in training; rises linearly from 0
            at the first layer.
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
            raise ValueError(
                f"embed_dim {self.embed_dim}: expected a multiple of num_heads {self.num_heads}"
            )
        if len(self.segment_lengths) != len(self.dilated_ratios):
            raise ValueError(
                f"segment_lengths {self.segment_lengths} and dilated_ratios "
                f"{self.dilated_ratios}: expected equally many"
            )


class DilatedSelfAttention(nn.Module):
    """Dilated self-attention with query, key, value and output projections."""

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
        """Attends within each of the sequences packed in `tokens` `(T, D)`; returns `(T, D)`."""
        projected = [
            projection(tokens).unflatten(-1, (self.config.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed, start = [], 0
        # Adjacent sequences of equal length form a batch for a single attention call.
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
    """Feed-forward network: linear, GELU, LayerNorm, linear."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps `(T, D)` to `(T, D)`."""
        # PyTorch computes GELU of half precision in float32; the original casts explicitly.
        output: Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(tokens))))
        return output


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer.

    Args:
        config: Configuration of the encoder.
        index: Number of the layer, which sets its drop path probability.
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
        """Maps `(T, D)` to `(T, D)`; in evaluation without gradients, `tokens` is overwritten."""
        if not torch.is_grad_enabled() and not self.training:
            return self._infer(tokens, lengths)
        update = self.dropout(self.self_attn(self.self_attn_layer_norm(tokens), lengths))
        tokens = tokens + self._drop_sequences(update, lengths)
        update = self.dropout(self.ffn(self.final_layer_norm(tokens)))
        return tokens + self._drop_sequences(update, lengths)

    def _infer(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        # In place, so that the states of a large slide are in memory only once.
        tokens += self.self_attn(self.self_attn_layer_norm(tokens), lengths)
        for rows in tokens.split(CHUNK if tokens.device.type == "cpu" else 64 * CHUNK):
            rows += self.ffn(self.final_layer_norm(rows))
        return tokens

    def _drop_sequences(self, update: Tensor, lengths: Sequence[int]) -> Tensor:
        """Drops the update of random sequences (stochastic depth, arXiv:1603.09382)."""
        if not self.training or not self.drop_path:
            return update
        keep = 1.0 - self.drop_path
        kept = torch.rand(len(lengths), device=update.device) < keep
        factors = kept.to(update.dtype).div_(keep)
        repeats = torch.tensor(lengths, device=update.device)
        return update * factors.repeat_interleave(repeats).unsqueeze(-1)


class LongNetEncoder(nn.Module):
    """Stack of encoder layers with a final norm."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config, index) for index in range(config.depth))
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.grad_checkpointing = False

    def set_attention_backend(self, name: str | None) -> None:
        """Sets the backend of all layers, a key of `attention_backends.BACKENDS`."""
        for module in self.modules():
            if isinstance(module, DilatedSelfAttention):
                module.backend = name

    def hidden_states(self, tokens: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
        """Yields the hidden states `(T, D)` before the first layer and after each layer.

        Without gradients the layers work in place, so a state must be used before the next one is
        requested.

        Args:
            tokens: Packed sequences `(T, D)`; may be overwritten.
            lengths: Number of tokens of each sequence.
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
        """Returns the normalised hidden state `(T, D)` after the last layer."""
        for state in self.hidden_states(tokens, lengths):
            last = state
        output: Tensor = self.layer_norm(last)
        return output
