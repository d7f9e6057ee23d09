"""Batches of each way hold the same samples, and packed ones have the loss of padded ones."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from benchmarks.pallava_batches import (
    WAYS,
    Samples,
    batches,
    check_packing,
    loss_of,
    main,
    make_batch,
    make_model,
    padding,
)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_holds_every_sample_once(way: str) -> None:
    samples = Samples.draw(40, seed=1)
    found = [i for batch in batches(samples, way, 4, seed=2) for i in batch]
    assert sorted(found) == list(range(40))


def test_padding_is_counted() -> None:
    samples = Samples([4, 10, 4, 10], [1, 3, 1, 3], [1] * 4)
    # 90 visual tokens: 94 and 100 in a sample.
    assert padding(samples, "packed", 4, 90) == (1, 1)
    assert padding(samples, "padded", 4, 90) == pytest.approx((400 / 388, 12 / 8))
    many = Samples.draw(400, seed=4)
    assert 1 < padding(many, "grouped", 4, 90)[0] < padding(many, "random", 4, 90)[0]


def test_a_packed_batch_has_the_loss_and_the_gradients_of_a_padded_one() -> None:
    samples, model = Samples.draw(4, seed=3), make_model(quick=True)
    assert check_packing(model, samples, 4) < 1e-5
    found = []
    for packed in (False, True):
        data = make_batch(samples, [0, 1, 2, 3], "random", model.llm.config.vocab_size)
        loss_of(model, data, packed=packed).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 40
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_it_runs() -> None:
    result = CliRunner().invoke(main, ["--quick"])
    assert result.exit_code == 0, result.output
    assert all(f"| {way} " in result.output for way in WAYS)
