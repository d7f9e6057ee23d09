"""Exact softmax attention that returns its log-sum-exp, by the fastest available kernel.

Every backend maps query, key and value `(batch, heads, tokens, head_dim)`, with any strides except
that the last one is 1, to an output of the same shape and the log-sum-exp `(batch, heads, tokens)`
in float32 (float64 for float64). The backward passes take output and log-sum-exp as arguments:
given those of a softmax over more keys, they return the gradients of that softmax. This is how
`gigapath.dilated_attention` accounts for keys that are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor, tuple[Any, ...]]"]
Gradients = tuple[Tensor, Tensor, Tensor]

SCORES_PER_CHUNK = 2**24
"""Number of attention scores that the `math` backend holds in memory: 64 MiB in float32."""


@dataclass(frozen=True)
class AttentionBackend:
    """An implementation of attention.

    Attributes:
        forward: Maps query, key and value to output, log-sum-exp and a tuple of whatever else
            `backward` needs.
        backward: Maps gradient, query, key, value, output, log-sum-exp and the elements of that
            tuple to the gradients of query, key and value.
    """

    forward: Forward
    backward: Callable[..., Gradients]


def _math_chunks(query: Tensor, num_keys: int) -> list[slice]:
    batch, heads, tokens, _ = query.shape
    rows = max(1, SCORES_PER_CHUNK // max(1, batch * heads * num_keys))
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _math_scores(query: Tensor, key: Tensor) -> Tensor:
    # In float32 at least, like the fused kernels, which accumulate scores in float32.
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(wide) * (1 / math.sqrt(query.shape[-1]))
    return scaled @ key.to(wide).transpose(-1, -2)


def _math_forward(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    outputs, sums = [], []
    for rows in _math_chunks(query, key.shape[2]):
        scores = _math_scores(query[:, :, rows], key)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse.unsqueeze(-1)).exp_()
        outputs.append((weights @ value.to(weights.dtype)).to(query.dtype))
        sums.append(lse)
    return torch.cat(outputs, 2), torch.cat(sums, 2), ()


def _math_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> Gradients:
    wide = lse.dtype
    scale = 1 / math.sqrt(query.shape[-1])
    grad_query = []
    grad_key = torch.zeros(key.shape, dtype=wide, device=key.device)
    grad_value = torch.zeros_like(grad_key)
    for rows in _math_chunks(query, key.shape[2]):
        weights = _math_scores(query[:, :, rows], key).sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
        grad_rows = grad[:, :, rows].to(wide)
        grad_value += weights.transpose(-1, -2) @ grad_rows
        # Gradient of the softmax: dS = P * (dP - rowsum(dO * O)). Computing the row sums from the
        # output lets `output` and `lse` belong to a softmax over more keys than `key` holds.
        row_sums = (grad_rows * output[:, :, rows]).sum(-1, keepdim=True)
        products = grad_rows @ value.to(wide).transpose(-1, -2)
        grad_scores = products.sub_(row_sums).mul_(weights).mul_(scale)
        grad_query.append(grad_scores @ key.to(wide))
        grad_key += grad_scores.transpose(-1, -2) @ query[:, :, rows].to(wide)
    return (
        torch.cat(grad_query, 2).to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
    )


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return output, lse, ()


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> Gradients:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients: Gradients = backward(grad, query, key, value, output, lse, 0.0, False)
    return gradients


def _cuda_flash_forward(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    # `rest` starts with the cumulative and maximum lengths and the state of the random generator,
    # all of which the backward kernel requires even without dropout.
    output, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return output, lse, tuple(rest[:6])


def _cuda_flash_backward(grad: Tensor, *saved: Any) -> Gradients:
    query, key, value, output, lse, *rest = saved
    offsets_query, offsets_key, max_query, max_key, seed, offset = rest
    gradients: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, lse.contiguous(),
        offsets_query, offsets_key, max_query, max_key, 0.0, False, seed, offset,
    )  # fmt: skip
    return gradients


def _cuda_efficient_forward(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    output, padded, seed, offset = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True
    )
    return output, padded[:, :, : query.shape[2]], (seed, offset)


def _cuda_efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> Gradients:
    # The kernel requires rows of the log-sum-exp padded to a multiple of 32.
    missing = -lse.shape[2] % 32
    padded = torch.nn.functional.pad(lse, (0, missing), value=math.inf).contiguous()
    gradients = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, output, padded, *rest, 0.0, [True, True, True, False]
    )
    return gradients[0], gradients[1], gradients[2]


def _flash_attn_forward(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    from flash_attn import flash_attn_func

    output, lse, _ = flash_attn_func(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), return_attn_probs=True
    )
    return output.transpose(1, 2), lse, ()


def _flash_attn_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> Gradients:
    # The package has no public backward pass; PyTorch contains the same kernel.
    none = torch.zeros(2, dtype=torch.uint64, device=query.device)
    length, keys = query.shape[2], key.shape[2]
    return _cuda_flash_backward(
        grad, query, key, value, output, lse, None, None, length, keys, none, none[0]
    )


BACKENDS: dict[str, AttentionBackend] = {
    "math": AttentionBackend(_math_forward, _math_backward),
    "cpu": AttentionBackend(_cpu_forward, _cpu_backward),
    "cuda_flash": AttentionBackend(_cuda_flash_forward, _cuda_flash_backward),
    "cuda_efficient": AttentionBackend(_cuda_efficient_forward, _cuda_efficient_backward),
    "flash_attn": AttentionBackend(_flash_attn_forward, _flash_attn_backward),
}
"""Backends by name.

`math` uses chunked matrix products and runs on any device. `cpu`, `cuda_flash` and `cuda_efficient`
are the kernels behind PyTorch's `scaled_dot_product_attention`. `flash_attn` is the package
flash-attn."""


@cache
def has_flash_attn() -> bool:
    """Returns whether the package flash-attn can be imported."""
    try:
        import flash_attn
    except ImportError:
        return False
    return hasattr(flash_attn, "flash_attn_func")


def select_backend(query: Tensor) -> str:
    """Returns the name of the fastest backend for the device, dtype and head width of a tensor.

    Args:
        query: `(..., head_dim)`.

    Example:
        >>> select_backend(torch.zeros(1, 16, 100, 48))
        'cpu'
    """
    head_dim, dtype, device = query.shape[-1], query.dtype, query.device
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or dtype is torch.float64:
        return "math"
    if head_dim % 8:  # the kernels of PyTorch and flash-attn require a multiple of 8
        return "math"
    # flash-attn 2 and PyTorch's copy of it need Ampere or newer.
    recent = torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype not in (torch.float16, torch.bfloat16) or head_dim > 256 or not recent:
        return "cuda_efficient"
    return "flash_attn" if has_flash_attn() and not query.requires_grad else "cuda_flash"


def get_backend(name: str) -> AttentionBackend:
    """Returns the backend with this name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: expected one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]
