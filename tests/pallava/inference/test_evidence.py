"""What a slide's tiles do to an answer, and that nothing is cited where they do nothing.

Evidence of a trained model: `tests/pallava/engine/test_slide_questions.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import pallava.inference.evidence as evidence_module
from pallava.inference.assistant import Assistant
from pallava.inference.evidence import (
    Evidence,
    SlideAnswer,
    find_evidence,
    integrated_gradients,
)
from pallava.modeling.llava import PALLaVA
from pallava.slide_bags import SlidePreparation
from tests.pallava import goldens
from tests.pallava.modeling.test_slide_tokens import FEATURES, bag, connector, encoder


@pytest.fixture
def assistant() -> Assistant:
    parts = PALLaVA(goldens.llm(r=0), encoder(), connector())
    return Assistant(parts.requires_grad_(False), goldens.tokenizer(), SlidePreparation(FEATURES))


def test_probabilities_are_those_of_the_model(assistant: Assistant) -> None:
    slide = bag(30)
    answer = SlideAnswer(assistant, slide, "Why?", max_new_tokens=3)
    assert answer.text == assistant.answer(slide, "Why?", max_new_tokens=3)
    part = torch.arange(30) < 20
    probabilities, same = answer.keep([torch.ones(30, dtype=torch.bool), part, part & ~part])
    assert same[0] and not same[2] and probabilities[2] == 0
    prompt = assistant.encode("Why?", has_image=True)
    for kept, found in ((slide, probabilities[0]), (slide.part(part), probabilities[1])):
        ids, expected = list(prompt), 1.0
        for token in answer.ids:  # one by one
            with torch.no_grad():
                logits = assistant.model(torch.tensor([ids]), [kept])["logits"][0, -1]
            expected *= float(logits.softmax(dim=-1)[token])
            ids.append(token)
        assert float(found) == pytest.approx(expected, rel=1e-3)


def test_scores_add_up_to_the_change_of_the_log_odds(assistant: Assistant) -> None:
    """Completeness of integrated gradients (arXiv:1703.01365, proposition 1)."""
    slide = bag(30)
    answer = SlideAnswer(assistant, slide, "Why?", max_new_tokens=1)
    mean = slide.features.mean(dim=0, keepdim=True).expand_as(slide.features)

    def log_odds(features: torch.Tensor) -> float:
        changed = slide._replace(features=features)
        ids = torch.tensor([assistant.encode("Why?", has_image=True)])
        with torch.no_grad():
            probability = assistant.model(ids, [changed])["logits"][0, -1].softmax(dim=-1)
        return float(probability[answer.ids[0]].logit())

    # The path starts beside equal tiles, where normalisation has no direction.
    near = mean + (slide.features - mean) * 1e-3
    expected = log_odds(slide.features) - log_odds(near)
    assert float(integrated_gradients(answer).sum()) == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_nothing_is_cited_if_tiles_do_nothing(assistant: Assistant) -> None:
    last = [m for m in assistant.model.projector.modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(last.weight)
    evidence = find_evidence(SlideAnswer(assistant, bag(30), "Why?", max_new_tokens=3))
    assert not len(evidence.cited) and not evidence.is_told
    assert str(evidence) == "cannot be told: without up to 90% of 30 tiles the answer is the same"
    assert evidence.fields()["told"] is False


@pytest.mark.parametrize("needed", [1, 2, 6, 7, 8, 31, 50, 51, 90])
def test_as_few_tiles_are_cited_as_change_the_answer(
    needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that changes once the first `needed` of a hundred tiles are missing."""

    class Planted:
        def keep(self, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            same = torch.tensor([bool(mask[:needed].any()) for mask in masks])
            return same.float(), same

    def scores(_: Any, kept: Tensor | None = None) -> Tensor:
        order = -torch.arange(100.0)
        return order if kept is None else order.where(kept, torch.tensor(-torch.inf))

    monkeypatch.setattr(evidence_module, "integrated_gradients", scores)
    evidence = find_evidence(cast(Any, Planted()))
    assert evidence.cited.tolist() == list(range(needed))
    assert (evidence.probability, evidence.probability_without) == (1, 0)
    assert evidence.is_told


def test_tiles_that_are_left_are_scored_as_a_slide_of_their_own(assistant: Assistant) -> None:
    slide, kept = bag(30), torch.arange(30) % 3 > 0
    found = integrated_gradients(SlideAnswer(assistant, slide, "Why?", max_new_tokens=1), kept)
    assert (found[~kept] == -torch.inf).all()
    answer = SlideAnswer(assistant, slide, "Why?", max_new_tokens=1)
    answer.bag = slide.part(kept)
    torch.testing.assert_close(found[kept], integrated_gradients(answer))


def test_an_answer_that_any_removal_changes_has_no_evidence() -> None:
    scores, cited = torch.rand(100), torch.arange(7)
    assert Evidence(scores, cited, 0.9, 0.1, random_changes=2, trials=20).is_told
    unstable = Evidence(scores, cited, 0.9, 0.1, random_changes=3, trials=20)
    assert not unstable.is_told and unstable.fields()["tiles"] == 0
    assert str(unstable).startswith("cannot be told: removing 7 of 100 tiles changes the answer")
