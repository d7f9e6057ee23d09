"""Keys and values of the language model: of the answers in a batch, and of kept conversations.

transformers' own caches either copy everything at each token or cannot change the rows of a batch,
and its continuous batching takes token ids only, not the embeddings of images.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SLACK = 64
"""Columns allocated ahead; the batch is copied once in so many tokens."""

LayerStates = tuple[Tensor, Tensor]
"""Keys and values of a layer for one row, each `(heads, length, head_dim)`."""


@dataclass
class _Span:
    """Which part of the buffers is in use; shared by all layers.

    Rows are aligned on the right: they all end at column `end`, as with left padding.
    """

    lengths: list[int] = field(default_factory=list)
    end: int = 0
    num_columns: int = 0

    @property
    def start(self) -> int:
        return self.end - max(self.lengths, default=0)


class _Layer(CacheLayerMixin):
    """Buffers `(rows, heads, columns, head_dim)` of one layer."""

    is_sliding = False  # all positions are kept, and the mask applies the window
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, span: _Span) -> None:
        super().__init__()
        self._span = span

    def lazy_initialization(self, key_states: Tensor) -> None:
        raise NotImplementedError  # `update` needs the values' shape too

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Writes the states of new tokens; returns those of all tokens `(rows, heads, ...)`."""
        del cache_kwargs
        span, num_rows = self._span, len(self._span.lengths)
        end = span.end + key_states.shape[2]
        if self.keys is None:
            self.keys = _zeros(key_states, num_rows, span.num_columns)
            self.values = _zeros(value_states, num_rows, span.num_columns)
            self.is_initialized = True
        assert self.values is not None
        self.keys[:num_rows, :, span.end : end] = key_states
        self.values[:num_rows, :, span.end : end] = value_states
        return (
            self.keys[:num_rows, :, span.start : end],
            self.values[:num_rows, :, span.start : end],
        )

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        return self.get_seq_length() + len(cache_position), 0

    def get_seq_length(self) -> int:
        return self._span.end - self._span.start

    def get_max_cache_shape(self) -> int:
        return -1


class KeyValues(Cache):
    """Keys and values of several answers whose rows come and go.

    Args:
        num_columns: Number of tokens to allocate.
        prefix: States of tokens that a single row starts with.
        prefix_length: Number of tokens to take from `prefix`.
    """

    def __init__(
        self, num_columns: int = 0, prefix: Sequence[LayerStates] = (), prefix_length: int = 0
    ) -> None:
        span = _Span(num_columns=num_columns)
        super().__init__(layer_class_to_replicate=functools.partial(_Layer, span))
        self._span = span
        if num_columns:
            span.lengths.append(0)
            for index, (keys, values) in enumerate(prefix):
                self.update(keys[None, :, :prefix_length], values[None, :, :prefix_length], index)
            self.advance(prefix_length)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of every row."""
        return self._span.lengths

    @property
    def width(self) -> int:
        """Number of tokens of the longest row."""
        return self._span.end - self._span.start

    @property
    def bytes_per_token(self) -> int:
        """Size of one token's keys and values in all layers; 0 before the first token."""
        buffers = [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]
        return sum(part.shape[1] * part.shape[3] * part.itemsize for part in buffers)

    @property
    def num_bytes(self) -> int:
        """Size of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def advance(self, num_tokens: int) -> None:
        """Counts tokens as read whose states a forward pass has written for every row."""
        self._span.end += num_tokens
        self._span.lengths[:] = [length + num_tokens for length in self._span.lengths]

    def make_room(self) -> None:
        """Makes room for one more token."""
        if self._span.end == self._span.num_columns:
            self._move(len(self.lengths), self.width, self)

    def append(self, other: KeyValues) -> None:
        """Adds the single row of another cache."""
        row, length, span = len(self.lengths), other.lengths[0], self._span
        if not row or length > span.end or row == len(self.layers[0].keys):
            self._move(row + 1, max(self.width, length), other)
        for layer, new in zip(self.layers, other.layers, strict=True):
            for old, states in ((layer.keys, new.keys), (layer.values, new.values)):
                # Masked columns must be finite: 0 times NaN is NaN.
                old[row, :, : span.end - length] = 0
                old[row, :, span.end - length : span.end] = states[0, :, :length]
        span.lengths.append(length)

    def remove(self, row: int) -> None:
        """Removes a row; the last row takes its place."""
        last = len(self.lengths) - 1
        if not last:  # frees the buffers
            self.layers.clear()
            self._span.end = self._span.num_columns = 0
        elif row != last:
            for layer in self.layers:
                layer.keys[row] = layer.keys[last]
                layer.values[row] = layer.values[last]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def states(self, row: int) -> list[LayerStates]:
        """Returns the states of one row, as views of the buffers."""
        end = self._span.end
        part = slice(end - self.lengths[row], end)
        return [(layer.keys[row, :, part], layer.values[row, :, part]) for layer in self.layers]

    def _move(self, num_rows: int, end: int, like: KeyValues) -> None:
        """Moves all rows to new buffers in which they end at column `end`."""
        span, used, width = self._span, len(self.lengths), self.width
        num_columns = end + SLACK
        while len(self.layers) < len(like.layers):
            self.layers.append(_Layer(span))
        for layer, model in zip(self.layers, like.layers, strict=True):
            # One buffer at a time, so that only one exists twice.
            for name in ("keys", "values"):
                new = _zeros(getattr(model, name), num_rows, num_columns)
                if used:
                    old = getattr(layer, name)
                    new[:used, :, end - width : end] = old[:used, :, span.start : span.end]
                setattr(layer, name, new)
            layer.is_initialized = True
        span.end, span.num_columns = end, num_columns


def _zeros(states: Tensor, num_rows: int, num_columns: int) -> Tensor:
    return states.new_zeros(num_rows, states.shape[1], num_columns, states.shape[3])


class _Entry(NamedTuple):
    units: list[Hashable]
    states: list[LayerStates]

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.states)


class KeptConversations:
    """States of the conversations asked about last, so that their beginnings are not read again.

    A conversation is a list of units: token ids of text, and digests of images.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []  # the least recently used first

    def find(self, units: list[Hashable]) -> tuple[list[LayerStates], int]:
        """Returns states with the longest beginning of `units`, and its number of units."""
        best, longest = None, 0
        for entry in self._entries:
            if (common := _common(entry.units, units)) > longest:
                best, longest = entry, common
        if best is None:
            return [], 0
        self._use(best)
        return best.states, longest

    def add(self, units: list[Hashable], states: list[LayerStates], max_bytes: int) -> None:
        """Keeps the states of a conversation and drops the least recently used beyond `max_bytes`.

        Args:
            units: Conversation; beginnings of it that are kept already are dropped.
            states: Copied unless they own their memory.
            max_bytes: Limit on all that is kept.
        """
        for entry in self._entries:
            if entry.units[: len(units)] == units:
                self._use(entry)
                break
        else:
            if sum(keys.nbytes + values.nbytes for keys, values in states) <= max_bytes:
                owned = [(_owned(keys), _owned(values)) for keys, values in states]
                self._entries = [
                    old for old in self._entries if old.units != units[: len(old.units)]
                ]
                self._entries.append(_Entry(units, owned))
        self.shrink(max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Drops the least recently used conversations beyond a limit."""
        total = sum(entry.num_bytes for entry in self._entries)
        while total > max_bytes:
            total -= self._entries.pop(0).num_bytes

    def _use(self, entry: _Entry) -> None:
        self._entries = [*(old for old in self._entries if old is not entry), entry]


def _owned(states: Tensor) -> Tensor:
    whole = states.numel() * states.element_size() == states.untyped_storage().nbytes()
    return states if whole else states.clone(memory_format=torch.contiguous_format)


def _common(left: list[Hashable], right: list[Hashable]) -> int:
    """Returns the length of the common beginning of two lists."""
    lengths = range(1, min(len(left), len(right)) + 1)
    return bisect_left(lengths, True, key=lambda length: left[:length] != right[:length])
