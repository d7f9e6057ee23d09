from __future__ import annotations

import pytest
import torch
from torch import nn

from pallava.engine.optim import GroupedAdamW, tag_parameters


def model() -> nn.ModuleDict:
    made = nn.ModuleDict({"llm": nn.Linear(2, 2), "projector": nn.Linear(2, 3)})
    tag_parameters(made, ["llm", "projector"])
    return made


def test_parts_learn_at_their_own_rate() -> None:
    whole = model()
    optimizer = GroupedAdamW(whole.parameters(), lr=0.1, lr_mult={"projector": 0.5}, weight_decay=0)
    rates = {group["lr"]: group["params"] for group in optimizer.param_groups}
    assert set(rates) == {0.1, 0.05}
    assert {id(p) for p in rates[0.05]} == {id(p) for p in whole["projector"].parameters()}
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    sum(p.sum() for p in whole.parameters()).backward()
    optimizer.step()
    for name, parameter in whole.named_parameters():  # Adam's first step is the learning rate
        step = 0.05 if name.startswith("projector") else 0.1
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, step))


def test_one_rate_is_one_group() -> None:
    optimizer = GroupedAdamW(model().parameters(), lr=0.1, lr_mult={"projector": 1.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def test_frozen_parameters_are_left_out() -> None:
    whole = model()
    whole["llm"].requires_grad_(False)
    optimizer = GroupedAdamW(whole.parameters(), lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(
        ValueError, match="names projectr, but the model's parts are llm, projector"
    ):
        GroupedAdamW(model().parameters(), lr_mult={"projectr": 0.5})
    with pytest.raises(ValueError, match="not tagged"):
        GroupedAdamW(nn.Linear(2, 2).parameters(), lr_mult={"projector": 0.5})
