"""Attention of new tokens in a padded batch, for language models whose heads share keys and values.

transformers repeats the keys and values of every group before it calls PyTorch's attention with a
mask. For one new token per row that copies the whole cache several times over at every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pallava.modeling.llava import without_adapter

_NAME = "sdpa_grouped"


def share_keys_and_values(llm: Any) -> None:
    """Selects attention without repeated keys and values, if `llm` takes PyTorch's now."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:  # transformers before 4.53
        return
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    base = without_adapter(llm)
    selects = getattr(base, "_can_set_attn_implementation", lambda: False)
    if getattr(base.config, "_attn_implementation", None) == "sdpa" and selects():
        base.config._attn_implementation = _NAME


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends as `sdpa_attention_forward`; returns `(rows, length, num_heads, head_dim)`.

    Args:
        module: Attention layer.
        query: `(rows, num_heads, length, head_dim)`.
        key: `(rows, num_groups, num_columns, head_dim)`.
        value: Like `key`.
        attention_mask: `(rows, 1, length, num_columns)` or None.
        kwargs: Further arguments of `sdpa_attention_forward`.
    """
    rows, num_heads, length, head_dim = query.shape
    num_groups = key.shape[1]
    if length > 1 or attention_mask is None or num_groups == num_heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # The heads of a group stand in the place of its tokens: all of them see the same columns.
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, num_groups, num_heads // num_groups, head_dim),
        key,
        value,
        attn_mask=attention_mask[..., : key.shape[2]],
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    return attended.reshape(rows, length, num_heads, head_dim), None
