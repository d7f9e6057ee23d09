from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gigapath import attention_backends
from gigapath.attention_backends import BACKENDS, get_backend, has_flash_attn, select_backend
from gigapath.dilated_attention import branch_calls, dilated_attention
from tests.gigapath.slide_goldens import golden, golden_json

CASES = golden_json("slide/dilated_attention_op")
HERE = ("math", "cpu")


def by_token(
    query: Tensor, key: Tensor, value: Tensor, segments: list[int], ratios: list[int]
) -> Tensor:
    """The definition, one sequence, head and token after the other, zeros materialised."""
    batch, length, heads, width = query.shape
    outputs, sums = [], []
    for segment, ratio in zip(segments, ratios, strict=True):
        segment = min(segment, length)
        padded = -(-segment // ratio) * ratio
        output = query.new_zeros(query.shape)
        lse = query.new_full(query.shape[:3], -1e8)
        for head in range(heads):
            group = head // -(-heads // ratio)
            for start in range(0, length, segment):
                places = range(group, padded, ratio)
                rows = [start + place for place in places if place < segment]
                rows = [row for row in rows if row < length]
                for number in range(batch):
                    keys = query.new_zeros(len(places), width)
                    values = keys.clone()
                    keys[: len(rows)] = key[number, rows, head]
                    values[: len(rows)] = value[number, rows, head]
                    scores = query[number, rows, head] @ keys.T / width**0.5
                    output[number, rows, head] = scores.softmax(-1) @ values
                    lse[number, rows, head] = scores.logsumexp(-1)
        outputs.append(output)
        sums.append(lse)
    weights = torch.stack(sums).softmax(0).detach()
    return (torch.stack(outputs) * weights.unsqueeze(-1)).sum(0)


def random_inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(sum(shape))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_core_is_the_original(case: dict[str, Any], backend: str) -> None:
    recorded = golden("slide/dilated_attention_op")
    name = case["case"]
    query, key, value = (recorded[f"{name}.{part}"] for part in "qkv")
    found = dilated_attention(query, key, value, case["seg"], case["ratio"], backend)
    torch.testing.assert_close(found, recorded[f"{name}.out"], rtol=0, atol=5e-6)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 7),
    branches=st.lists(
        st.tuples(st.integers(1, 50), st.sampled_from([1, 2, 3, 4, 8])), min_size=1, max_size=3
    ),
    backend=st.sampled_from(HERE),
)
def test_any_shape_is_the_definition_with_its_gradients(
    batch: int, length: int, heads: int, branches: list[tuple[int, int]], backend: str
) -> None:
    segments, ratios = (list(numbers) for numbers in zip(*branches, strict=True))
    inputs = random_inputs(batch, length, heads, 4)
    found = dilated_attention(*inputs, segments, ratios, backend)
    expected = by_token(*inputs, segments, ratios)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(found)
    ours = torch.autograd.grad(found, inputs, cotangent)
    if expected.requires_grad:
        theirs = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 60),
    heads=st.integers(1, 16),
    segment=st.integers(1, 70),
    dilation=st.integers(1, 16),
)
def test_calls_visit_every_covered_token_and_head_once(
    batch: int, length: int, heads: int, segment: int, dilation: int
) -> None:
    visits = torch.zeros(batch, length, heads)
    for call in branch_calls(batch, length, heads, segment, dilation):
        call.view(visits).add_(1)
    places = torch.arange(length) % min(segment, length) % dilation
    groups = torch.arange(heads) // -(-heads // dilation)
    expected = (places.unsqueeze(1) == groups).float().expand(batch, -1, -1)
    assert torch.equal(visits, expected)


def test_a_branch_over_one_segment_is_few_calls() -> None:
    lengths, ratios = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
    calls = [
        len(branch_calls(1, 4097, 16, segment, ratio))
        for segment, ratio in zip(lengths, ratios, strict=True)
    ]
    assert max(calls) <= 2


def test_views_of_a_larger_tensor_and_any_strides() -> None:
    storage = torch.randn(2, 23, 5, 3, 4, dtype=torch.float64)
    query, key, value = storage.unbind(3)
    expected = by_token(query, key, value, [7, 30], [1, 2])
    torch.testing.assert_close(dilated_attention(query, key, value, [7, 30], [1, 2]), expected)
    turned = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in (query, key, value)]
    assert turned[0].stride(-1) != 1
    torch.testing.assert_close(dilated_attention(*turned, [7, 30], [1, 2]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", HERE)
def test_half_precision_of_large_scores(dtype: torch.dtype, backend: str) -> None:
    inputs = [40 * tensor.detach() for tensor in random_inputs(1, 50, 4, 8)]
    narrow = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    found = dilated_attention(*narrow, [16, 64], [1, 2], backend)
    expected = by_token(*(tensor.detach().double() for tensor in narrow), [16, 64], [1, 2])
    assert found.dtype is dtype
    assert (found.double() - expected).norm() / expected.norm() < 1e-2
    found.sum().backward()
    assert all(bool(torch.isfinite(tensor.grad).all()) for tensor in narrow)  # type: ignore[arg-type]


def test_plain_products_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(1, 30, 2, 4)
    whole = dilated_attention(*inputs, [30], [1], "math")
    gradients = torch.autograd.grad(whole.sum(), inputs)
    monkeypatch.setattr(attention_backends, "SCORES_PER_CHUNK", 100)
    chunked = dilated_attention(*inputs, [30], [1], "math")
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked.sum(), inputs), gradients)


def test_no_second_derivative_is_made_up() -> None:
    inputs = random_inputs(1, 9, 2, 4)
    (gradient, *_) = torch.autograd.grad(
        dilated_attention(*inputs, [4], [1]).square().sum(), inputs, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(key=torch.zeros(1, 6, 2, 4)), r"\(1, 5, 2, 4\), \(1, 6, 2, 4\)"),
        (dict(query=torch.zeros(5, 2, 4)), r"expected one shape \(B, L, H, D\)"),
        (dict(segment_lengths=[4, 8]), "expected equally many"),
        (dict(segment_lengths=[], dilated_ratios=[]), "at least one"),
        (dict(dilated_ratios=[0]), "expected numbers of at least 1"),
        (dict(backend="triton"), "'triton': expected one of cpu, cuda_efficient"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    tensor = torch.zeros(1, 5, 2, 4)
    arguments = dict(
        query=tensor, key=tensor, value=tensor, segment_lengths=[4], dilated_ratios=[1]
    )
    with pytest.raises(ValueError, match=message):
        dilated_attention(**{**arguments, **change})  # type: ignore[arg-type]


def test_the_package_flash_attn_is_used_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("flash_attn")
    calls = []

    def flash_attn_func(
        query: Tensor, key: Tensor, value: Tensor, return_attn_probs: bool
    ) -> tuple[Tensor, Tensor, None]:
        calls.append(query.shape)
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output, lse, _ = get_backend("math").forward(*parts)
        return output.transpose(1, 2), lse, None

    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    has_flash_attn.cache_clear()
    try:
        assert has_flash_attn()
    finally:
        has_flash_attn.cache_clear()
    with torch.no_grad():
        inputs = random_inputs(1, 20, 4, 8)
        found = dilated_attention(*inputs, [8, 32], [1, 2], "flash_attn")
        torch.testing.assert_close(found, dilated_attention(*inputs, [8, 32], [1, 2], "math"))
    assert calls


def test_selection_on_the_cpu() -> None:
    assert select_backend(torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)) == "cpu"
    assert select_backend(torch.zeros(1, 2, 3, 4, device="meta")) == "math"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("backend", "dtype", "atol"),
    [
        ("math", torch.float32, 1e-5),
        ("cuda_efficient", torch.float32, 2e-3),
        ("cuda_efficient", torch.float16, 5e-3),
        ("cuda_flash", torch.float16, 5e-3),
        ("cuda_flash", torch.bfloat16, 3e-2),
        ("flash_attn", torch.bfloat16, 3e-2),
    ],
)
def test_kernels_of_a_gpu(backend: str, dtype: torch.dtype, atol: float) -> None:
    if backend == "flash_attn" and not has_flash_attn():
        pytest.skip("flash-attn is not installed")
    shape, branches = (2, 333, 16, 48), ([32, 100, 400], [1, 2, 8])
    inputs = [tensor.detach().to(dtype) for tensor in random_inputs(*shape)]
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    narrow = [tensor.cuda().requires_grad_() for tensor in inputs]
    expected = dilated_attention(*wide, *branches, "math")
    found = dilated_attention(*narrow, *branches, backend)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=atol)
    cotangent = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, wide, cotangent)
    ours = torch.autograd.grad(found, narrow, cotangent.cuda().to(dtype))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=4 * atol)
    assert set(HERE) < set(BACKENDS)
