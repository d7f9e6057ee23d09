from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pallava.modeling.linear import Linear
from tests.pallava import goldens

onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def layer(bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 5, 24), (2, 3, 5, 24), (0, 24)])
def test_both_ways_give_the_same(shape: tuple[int, ...], bias: bool) -> None:
    made, inputs = layer(bias), goldens.noise(*shape)
    expected = F.linear(inputs, made.weight, made.bias)
    assert torch.equal(made(inputs), expected)
    with torch.no_grad():
        found = made(inputs)
    assert found.shape == expected.shape
    assert found.is_contiguous() and not found.is_mkldnn
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)


def test_inputs_may_be_views() -> None:
    made, inputs = layer(), goldens.noise(3, 24, 7).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            made(inputs), F.linear(inputs, made.weight, made.bias), atol=1e-6, rtol=0
        )


def products(made: Linear, inputs: torch.Tensor) -> set[str]:
    """Names of the matrix products that a call runs."""
    with torch.profiler.profile() as profile:
        made(inputs)
    names = {event.key for event in profile.key_averages()}
    return names & {"aten::linear", "aten::mkldnn_linear"}


@onednn
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_is_asked_where_no_graph_is_kept() -> None:
    made, inputs = layer(), goldens.noise(3, 24)
    assert products(made, inputs) == {"aten::linear"}
    with torch.no_grad():
        assert products(made, inputs) == {"aten::mkldnn_linear"}
        with torch.backends.mkldnn.flags(enabled=False):
            assert products(made, inputs) == {"aten::linear"}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert products(made, inputs) == {"aten::linear"}
            assert made(inputs).dtype == torch.bfloat16
        half = layer().bfloat16()
        assert products(half, inputs.bfloat16()) == {"aten::linear"}


def test_it_is_a_linear_layer_to_everyone_else() -> None:
    made = layer()
    assert isinstance(made, nn.Linear)
    assert set(made.state_dict()) == {"weight", "bias"}
    with torch.no_grad():
        assert made.to("meta")(torch.zeros(2, 24, device="meta")).shape == (2, 40)
