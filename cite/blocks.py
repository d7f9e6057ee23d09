"""View of a pre-norm transformer block that is independent of the library of its modules.

Shapes: B images, T tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(Protocol):
    """Interface of projections from tokens to queries, keys and values."""

    def __call__(self, hidden_states: Tensor, num_queries: int | None) -> tuple[Tensor, ...]:
        """Maps `(B, T, D)` to queries `(B, num_queries or T, D)`, keys and values `(B, T, D)`.

        Queries are computed for the first `num_queries` tokens only.
        """


@dataclass(frozen=True)
class Packed:
    """Queries, keys and values from a single linear layer.

    Attributes:
        qkv: Linear layer from D to 3 * D, possibly wrapped by LoRA.
    """

    qkv: nn.Module

    def __call__(self, hidden_states: Tensor, num_queries: int | None) -> tuple[Tensor, ...]:
        """See `Projection`."""
        # A layer wrapped by LoRA must be called as a whole; only a plain one can be sliced.
        if num_queries is None or type(self.qkv) is not nn.Linear:
            query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
            return query[:, :num_queries], key, value
        weight, bias = self.qkv.weight, self.qkv.bias
        width = len(weight) // 3
        bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
        query = F.linear(hidden_states[:, :num_queries], weight[:width], bias_q)
        return query, *F.linear(hidden_states, weight[width:], bias_kv).chunk(2, dim=-1)


@dataclass(frozen=True)
class Split:
    """Queries, keys and values from three layers.

    Attributes:
        query: Layer from D to D.
        key: Layer from D to D.
        value: Layer from D to D.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module

    def __call__(self, hidden_states: Tensor, num_queries: int | None) -> tuple[Tensor, ...]:
        """See `Projection`."""
        queries = self.query(hidden_states[:, :num_queries])
        return queries, self.key(hidden_states), self.value(hidden_states)


@dataclass(frozen=True)
class Block:
    """Parts of a block: x + scale1(attention(norm1 x)), then x + scale2(mlp(norm2 x)).

    Attributes:
        norm1: Norm before the attention.
        project: Projection to queries, keys and values.
        num_heads: Number of heads H.
        out: Output projection of the attention, D to D.
        norm2: Norm before the MLP.
        mlp: MLP, D to D.
        scale1: LayerScale of the attention branch, or None.
        scale2: LayerScale of the MLP branch, or None.
        norm_query: Norm of the queries of each head, or None.
        norm_key: Norm of the keys of each head, or None.
        norm_context: Norm before the output projection, or None.
    """

    norm1: nn.Module
    project: Projection
    num_heads: int
    out: nn.Module
    norm2: nn.Module
    mlp: Callable[[Tensor], Tensor]
    scale1: nn.Module | None = None
    scale2: nn.Module | None = None
    norm_query: nn.Module | None = None
    norm_key: nn.Module | None = None
    norm_context: nn.Module | None = None

    def __call__(self, hidden_states: Tensor, num_queries: int | None = None) -> Tensor:
        """Runs the block.

        Args:
            hidden_states: `(B, T, D)`.
            num_queries: Number of leading tokens to compute; by default all. The others still serve
                as keys and values.

        Returns:
            `(B, num_queries or T, D)`, in the dtype of `hidden_states`.
        """
        attended = self._attend(normalise(self.norm1, hidden_states), num_queries)
        hidden_states = _add_branch(hidden_states[:, :num_queries], attended, self.scale1)
        return _add_branch(
            hidden_states, self.mlp(normalise(self.norm2, hidden_states)), self.scale2
        )

    def _attend(self, hidden_states: Tensor, num_queries: int | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.project(hidden_states, num_queries)
        )
        if self.norm_query is not None:
            query = normalise(self.norm_query, query)
        if self.norm_key is not None:
            key = normalise(self.norm_key, key)
        context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if self.norm_context is not None:
            context = normalise(self.norm_context, context)
        return self.out(context)


def _add_branch(hidden_states: Tensor, branch: Tensor, scale: nn.Module | None) -> Tensor:
    if scale is not None:
        branch = scale(branch)
    # Autocast computes branches in half precision; addition then promotes to the residual stream's
    # fp32. Without autocast, the residual stream keeps its dtype.
    if torch.is_autocast_enabled(hidden_states.device.type):
        return hidden_states + branch
    return hidden_states + branch.to(hidden_states.dtype)


def normalise(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """Applies a norm in the dtype of its parameters and returns the dtype of the activations.

    With activations in half precision, norms are thus computed in fp32.
    """
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dtype == hidden_states.dtype:
        return norm(hidden_states)
    return norm(hidden_states.to(weight.dtype)).to(hidden_states.dtype)


class QuickGELU(nn.Module):
    """OpenAI CLIP's approximation of GELU, `x * sigmoid(1.702 x)` (github.com/openai/CLIP).

    Saves one tensor for the backward pass, where the formula as written saves two.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Applies the activation to a tensor of any shape."""
        return _QuickGELU.apply(hidden_states)


class _QuickGELU(torch.autograd.Function):
    """Computes QuickGELU as silu(1.702 x) / 1.702, whose derivative is silu'(1.702 x)."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor) -> Tensor:
        scaled = hidden_states * 1.702
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0], scaled)


class PackedAttention(nn.Module):
    """Weights of `torch.nn.MultiheadAttention` as two linear layers, which LoRA can wrap.

    State dicts keep the names `in_proj_weight`, `in_proj_bias` and `out_proj.*`.

    Args:
        attention: Self-attention with a packed projection; shares its parameters.

    Raises:
        ValueError: If queries, keys and values have different widths.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None:
            raise ValueError("attention: expected queries, keys and values of one width")
        self.num_heads = attention.num_heads
        width = attention.embed_dim
        self.qkv = nn.Linear(width, 3 * width, device="meta")
        self.qkv.weight, self.qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(width, width, device="meta")
        self.out_proj.weight = attention.out_proj.weight
        self.out_proj.bias = attention.out_proj.bias
        self.register_load_state_dict_pre_hook(_to_linear_names)
        self.register_state_dict_post_hook(_to_published_names)


def _to_linear_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: object
) -> None:
    for part in ("weight", "bias"):
        if f"{prefix}in_proj_{part}" in state_dict:
            state_dict[f"{prefix}qkv.{part}"] = state_dict.pop(f"{prefix}in_proj_{part}")


def _to_published_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: object
) -> None:
    for part in ("weight", "bias"):
        if f"{prefix}qkv.{part}" in state_dict:
            state_dict[f"{prefix}in_proj_{part}"] = state_dict.pop(f"{prefix}qkv.{part}")
