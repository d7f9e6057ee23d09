"""The projection neck, compared with the published code."""

from __future__ import annotations

import re

import pytest
import torch

from cite.projection import INITIALISATIONS, Projection
from tests.cite.goldens import FP16, FP32, read_arrays


@pytest.mark.parametrize(
    ("file", "tolerance"), [("neck_head.npz", FP32), ("neck_head_fp16.npz", FP16)]
)
def test_recorded_outputs(file: str, tolerance: dict[str, float]) -> None:
    golden = read_arrays(file)
    cases = [key.removesuffix("/y") for key in golden if key.endswith("/y")]
    assert len(cases) >= 4
    for case in cases:
        weight = golden[f"{case}/weight"]
        acts = re.fullmatch(r"neck/act_before=(\w+)_act_after=(\w+)", case)
        before, after = acts.groups() if acts else ("None", "None")
        neck = Projection(
            weight.shape[1],
            weight.shape[0],
            act_before=None if before == "None" else before,
            act_after=None if after == "None" else after,
        )
        neck.load_state_dict({"weight": weight, "bias": golden[f"{case}/bias"]})
        expected = golden[f"{case}/y"].float()
        torch.testing.assert_close(neck(golden["neck/x"]), expected, **tolerance)


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("out_features", [64, 32])
def test_initial_weights_are_distributed_as_recorded(init: str, out_features: int) -> None:
    torch.manual_seed(0)
    ours = Projection(48, out_features, init)
    recorded = read_arrays("neck_head.npz")[f"neck/{init}_48to{out_features}/weight"]
    identity = torch.eye(out_features, 48)
    if init == "identity":
        assert torch.equal(ours.weight.detach(), recorded)
        assert torch.equal(recorded, identity)
    base = identity if init == "normal_identity" else torch.zeros_like(identity)
    spread = (ours.weight.detach() - base).std()
    torch.testing.assert_close(spread, (recorded - base).std(), rtol=0.1, atol=0)
    bound = 48**-0.5
    assert 0.9 * bound < float(ours.bias.detach().abs().max()) <= bound


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="init 'ones'"):
        Projection(4, 4, "ones")
    with pytest.raises(ValueError, match="activation 'relu'"):
        Projection(4, 4, act_before="relu")
    with pytest.raises(ValueError, match=r"width 5 arrive, in_features is 4"):
        Projection(4, 4)(torch.zeros(2, 5))
