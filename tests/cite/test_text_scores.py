"""Scores by similarity to texts: recorded values, several texts per class, state dicts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cite.text_embeddings import TextEmbeddings
from cite.text_scores import TextScores
from tests.cite.goldens import FP16, FP32, read_arrays


def texts(embeddings: torch.Tensor, class_ids: list[int]) -> TextEmbeddings:
    names = tuple(f"class {i}" for i in range(max(class_ids) + 1))
    return TextEmbeddings(embeddings, torch.tensor(class_ids), names, ("text",) * len(class_ids))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_recorded_scores_and_gradients(learnable: bool, half: bool) -> None:
    golden = read_arrays("neck_head_fp16.npz" if half else "neck_head.npz")
    tolerance = FP16 if half else FP32
    case = f"head/learnable_t={learnable}"
    scores = TextScores(
        texts(golden["head/text_embeddings"], [0, 1, 2]), learnable_temperature=learnable
    )
    features = golden["head/feat"].float().clone().requires_grad_()
    found = scores(features)
    expected = golden[f"{case}/scores"].float()
    torch.testing.assert_close(found / 100, expected / 100, **tolerance)
    torch.testing.assert_close(found.softmax(1), golden[f"{case}/softmax"].float(), **tolerance)
    loss = F.cross_entropy(found, golden["head/labels"])
    torch.testing.assert_close(loss / 10, golden[f"{case}/loss"] / 10, **tolerance)
    loss.backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad, golden[f"{case}/feat_grad"].float(), **tolerance)
    if learnable:
        assert scores.temperature.grad is not None
        wanted = golden[f"{case}/temperature_grad"].float()
        torch.testing.assert_close(scores.temperature.grad / 10, wanted / 10, **tolerance)
    assert [name for name, _ in scores.named_parameters()] == ["temperature"] * learnable


def test_embeddings_are_kept_and_move() -> None:
    scores = TextScores(texts(torch.randn(3, 4), [0, 1, 2]))
    assert set(scores.state_dict()) == {"text_embeddings", "temperature"}
    assert scores.double().text_embeddings.dtype == torch.float64


def test_published_checkpoints_have_no_embeddings() -> None:
    scores = TextScores(texts(torch.randn(3, 4), [0, 1, 2]))
    expected = scores.text_embeddings.clone()
    scores.load_state_dict({})
    assert torch.equal(scores.text_embeddings, expected)
    with pytest.raises(RuntimeError, match="temperature"):
        TextScores(texts(expected, [0, 1, 2]), learnable_temperature=True).load_state_dict({})


def test_several_texts_of_a_class() -> None:
    torch.manual_seed(0)
    embeddings, features = torch.randn(5, 8) * torch.arange(1, 6)[:, None], torch.randn(6, 8)
    content = texts(embeddings, [0, 1, 1, 1, 0])
    cosine = F.normalize(features, dim=-1) @ F.normalize(embeddings, dim=-1).T
    nearest = TextScores(content, temperature=0.0, several="max")(features)
    best = torch.stack([cosine[:, [0, 4]].amax(1), cosine[:, 1:4].amax(1)], dim=1)
    torch.testing.assert_close(nearest, best)
    mean = TextScores(content, temperature=0.0, several="mean")(features)
    centre = F.normalize(embeddings, dim=-1)[1:4].mean(0)
    torch.testing.assert_close(mean[:, 1], F.cosine_similarity(features, centre[None]))


def test_rebuilt_from_its_description() -> None:
    for several in ("mean", "max"):
        scores = TextScores(texts(torch.randn(5, 8), [0, 1, 1, 1, 0]), several=several)
        again = TextScores.from_spec(scores.spec)
        again.load_state_dict(scores.state_dict())
        features = torch.randn(3, 8)
        torch.testing.assert_close(again(features), scores(features))


def test_impossible_arguments() -> None:
    content = texts(torch.ones(2, 4), [0, 1])
    with pytest.raises(ValueError, match="several 'median'"):
        TextScores(content, several="median")
    with pytest.raises(ValueError, match=r"width 5 meet .* width 4; put a ProjectionNeck"):
        TextScores(content)(torch.zeros(2, 5))
