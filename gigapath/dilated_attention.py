"""Dilated attention of LongNet, exact and without padding, gathering or scattering.

LongNet (Ding et al. 2023, arXiv:2307.02486), section 3, in the variant that the released GigaPath
weights were trained with. A branch with segment length `s` and dilation `r` splits the sequence
into segments of `s` tokens. Its heads form `r` groups of adjacent heads; heads of group `g` attend,
within a segment, only among the tokens at positions `g, g + r, g + 2r, ...`. At each token and
head, the outputs of the branches that cover it are averaged with weights proportional to their
softmax denominators (equation 10), which are treated as constants in the backward pass.

The published implementation pads the sequence to whole segments and each segment to a multiple of
`r`, and the padding stays in the softmax as keys of score 0 and value 0. The weights were trained
that way, so the zeros must count: without them the output of the released model changes by 0.11 at
1500 tokens. Here they are accounted for without being stored: `z` zeros turn a log-sum-exp `l` into
`log(exp(l) + z)`, and the output is multiplied by `exp(l) / (exp(l) + z)`.

The tokens of a group are equidistant, so a branch takes a few attention calls on strided views.

Shapes: B sequences, L tokens, H heads, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gigapath.attention_backends import get_backend, select_backend

UNCOVERED = -1e8
"""Log-sum-exp of a branch at tokens and heads that it does not cover, as in the original.

Finite, because a softmax over branches that are all `-inf` would be NaN."""


@dataclass(frozen=True)
class Call:
    """A strided view of `(B, L, H, D)` on which one attention call works.

    Attributes:
        start: First element as (sequence, token, head).
        sizes: Batch size, number of heads and number of tokens of the call.
        steps: For each of these axes, the step in (sequences, tokens, heads).
        zeros: Number of zero keys that the original's padding adds to the softmax.
    """

    start: tuple[int, int, int]
    sizes: tuple[int, int, int]
    steps: tuple[tuple[int, int, int], ...]
    zeros: int

    def view(self, tensor: Tensor) -> Tensor:
        """Views `(B, L, H, D)` as `(batch, heads, tokens, D)`; `(B, L, H)` likewise, without D."""
        strides = tensor.stride()
        offset = tensor.storage_offset() + _dot(self.start, strides)
        steps = [_dot(step, strides) for step in self.steps]
        return tensor.as_strided(
            (*self.sizes, *tensor.shape[3:]), (*steps, *strides[3:]), int(offset)
        )


def _dot(step: Sequence[int], strides: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(step, strides, strict=False))


def _merge(axes: list[tuple[int, tuple[int, int, int]]]) -> list[tuple[int, tuple[int, int, int]]]:
    """Drops axes of size 1 and merges adjacent axes that a single step describes."""
    merged: list[tuple[int, tuple[int, int, int]]] = []
    for size, step in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(size * part for part in step):
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    return merged


def _calls(
    start: tuple[int, int, int],
    axes: list[tuple[int, tuple[int, int, int]]],
    tokens: tuple[int, int],
    zeros: int,
) -> Iterator[Call]:
    """Yields as few calls as possible: the two largest axes become batch and heads."""
    axes = sorted(_merge(axes), key=lambda axis: axis[0])
    looped, kept = axes[:-2], axes[-2:]
    while len(kept) < 2:
        kept.insert(0, (1, (0, 0, 0)))
    # The axis with the smallest token step becomes the heads, which vary fastest in memory.
    batch, heads = sorted(kept, key=lambda axis: (axis[1][0], axis[1][1]), reverse=True)
    count, dilation = tokens
    for index in itertools.product(*(range(size) for size, _ in looped)):
        first = tuple(
            begin + sum(i * step[axis] for i, (_, step) in zip(index, looped, strict=True))
            for axis, begin in enumerate(start)
        )
        yield Call(
            first,  # type: ignore[arg-type]
            (batch[0], heads[0], count),
            (batch[1], heads[1], (0, dilation, 0)),
            zeros,
        )


@lru_cache(maxsize=1024)
def branch_calls(
    num_sequences: int, length: int, num_heads: int, segment_length: int, dilation: int
) -> tuple[Call, ...]:
    """Plans the attention calls of one branch; cached, because all layers share the plan.

    Args:
        num_sequences: Number of sequences B.
        length: Number of tokens L.
        num_heads: Number of heads H.
        segment_length: Tokens per segment, clipped to L.
        dilation: Distance between the tokens of a group.
    """
    segment = min(segment_length, length)
    padded = -(-segment // dilation)
    # The original pads the heads to a multiple of the dilation, so the last group may be smaller.
    group_heads = -(-num_heads // dilation)
    whole, rest = divmod(num_heads, group_heads)
    full, tail = divmod(length, segment)
    calls: list[Call] = []
    for first, count, tokens in ((0, full, segment), (full * segment, 1, tail)):
        if not tokens:
            continue
        # The first `tokens % dilation` groups have one token more than the others, so they need
        # separate calls.
        longer = tokens % dilation
        bounds = sorted({0, min(longer, whole), whole})
        runs = [(a, b - a, group_heads) for a, b in itertools.pairwise(bounds)]
        if rest:
            runs.append((whole, 1, rest))
        for group, groups, heads in runs:
            kept = -(-(tokens - group) // dilation) if group < tokens else 0
            if not kept:
                continue
            axes = [
                (num_sequences, (1, 0, 0)),
                (count, (0, segment, 0)),
                (groups, (0, 1, group_heads)),
                (heads, (0, 0, 1)),
            ]
            start = (0, first + group, group * group_heads)
            calls.extend(_calls(start, axes, (kept, dilation), padded - kept))
    return tuple(calls)


def _with_zeros(output: Tensor, lse: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """Adds `zeros` keys of score 0 and value 0 to a softmax; overwrites `output`."""
    if not zeros:
        return output, lse
    larger = torch.logaddexp(lse, lse.new_tensor(float(zeros)).log())
    output *= (lse - larger).exp_().unsqueeze(-1).to(output.dtype)
    return output, larger


class _DilatedAttention(torch.autograd.Function):
    """Runs all attention calls and sums their weighted outputs.

    This is a single autograd function because the weights of the branches are constants in the
    backward pass, and because the backward kernels need log-sum-exps that include the zero keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        branches: tuple[tuple[Call, ...], ...],
        name: str,
    ) -> Tensor:
        """Mixes the outputs of the branches, weighted by the softmax of their log-sum-exps.

        Args:
            ctx: Context of autograd.
            query: `(B, L, H, D)`, as are `key` and `value`.
            key: Keys.
            value: Values.
            branches: Calls of each branch; see `branch_calls`.
            name: Name of the attention backend.
        """
        backend = get_backend(name)
        sums_dtype = torch.promote_types(query.dtype, torch.float32)
        sums = torch.full(
            (len(branches), *query.shape[:3]), UNCOVERED, dtype=sums_dtype, device=query.device
        )
        outputs, rests = [], []
        for branch, calls in enumerate(branches):
            for call in calls:
                output, lse, rest = backend.forward(
                    call.view(query), call.view(key), call.view(value)
                )
                output, lse = _with_zeros(output, lse, call.zeros)
                call.view(sums[branch]).copy_(lse)
                outputs.append(output)
                rests.append(rest)
        weights = sums.softmax(0)
        mixed = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        index = 0
        for branch, calls in enumerate(branches):
            for call in calls:
                weight = call.view(weights[branch]).unsqueeze(-1).to(query.dtype)
                call.view(mixed).addcmul_(outputs[index], weight)
                index += 1
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, sums, *outputs)
            ctx.branches, ctx.backend, ctx.rests = branches, backend, rests
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sums the gradients of all calls, given the log-sum-exps of the mixture."""
        query, key, value, sums, *outputs = ctx.saved_tensors
        weights = sums.softmax(0)
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        index = 0
        for branch, calls in enumerate(ctx.branches):
            for call in calls:
                weight = call.view(weights[branch]).unsqueeze(-1).to(grad.dtype)
                parts = ctx.backend.backward(
                    call.view(grad) * weight,
                    *(call.view(tensor) for tensor in (query, key, value)),
                    outputs[index],
                    call.view(sums[branch]).contiguous(),
                    *ctx.rests[index],
                )
                for gradient, part in zip(gradients, parts, strict=True):
                    call.view(gradient).add_(part)
                index += 1
        return (*gradients, None, None)


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """Computes dilated attention; see the module docstring for the definition.

    Args:
        query: `(B, L, H, D)`.
        key: `(B, L, H, D)`.
        value: `(B, L, H, D)`.
        segment_lengths: Tokens per segment of each branch.
        dilated_ratios: Dilation of each branch.
        backend: A key of `gigapath.attention_backends.BACKENDS`; by default the fastest one for
            the device and dtype.

    Returns:
        `(B, L, H, D)`; zeros where no branch covers a token and head.

    Raises:
        ValueError: If the shapes differ, if there are not as many ratios as segment lengths, or if
            one of them is below 1.

    Example:
        >>> query, key, value = torch.randn(3, 1, 100, 8, 16)
        >>> dilated_attention(query, key, value, (16, 64), (1, 4)).shape
        torch.Size([1, 100, 8, 16])
    """
    if query.dim() != 4 or query.shape != key.shape or query.shape != value.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value: {shapes}: expected one shape (B, L, H, D)")
    if len(segment_lengths) != len(dilated_ratios) or not segment_lengths:
        raise ValueError(
            f"segment_lengths {list(segment_lengths)} and dilated_ratios {list(dilated_ratios)}: "
            "expected equally many, at least one"
        )
    if min(*segment_lengths, *dilated_ratios) < 1:
        raise ValueError(
            f"segment_lengths {list(segment_lengths)}, dilated_ratios {list(dilated_ratios)}: "
            "expected numbers of at least 1"
        )
    if not query.numel():
        return torch.zeros_like(query)
    query, key, value = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    num_sequences, length, num_heads, _ = query.shape
    branches = tuple(
        branch_calls(num_sequences, length, num_heads, segment, dilation)
        for segment, dilation in zip(segment_lengths, dilated_ratios, strict=True)
    )
    mixed: Tensor = _DilatedAttention.apply(
        query, key, value, branches, backend or select_backend(query)
    )
    return mixed
