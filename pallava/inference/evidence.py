"""Finds the tiles of a slide that an answer depends on, and tests whether it really does.

A score ranks the tiles, and the highest are removed until the answer changes; those that are left
are scored again on the way. The effect of a removal is measured on the model itself: tiles can be
dropped from a `SlideBag` without moving the others. The same number of random tiles is removed for
comparison. `benchmarks/slide_evidence.py` compares scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pallava.inference.assistant import Assistant
from pallava.slide_bags import SlideBag

TRIALS = 20
"""Number of random removals that the cited tiles are compared with."""

MAX_SHARE = 0.9
"""Largest fraction of the tiles that may be cited. An answer may depend on most of a slide: "much"
tumour changes only once most of the tumour is gone."""

_RESCORED = (1 / 16, 1 / 4, 1 / 2, MAX_SHARE)
"""Fractions of the tiles after whose removal the others are scored again. Tiles that say the same
hide each other's effect until some of them are gone (`benchmarks/slide_evidence.py`)."""

MAX_RANDOM = 0.1
"""Largest fraction of random removals that may change the answer for evidence to count."""

_BATCH_TILES = 32_768
_BATCH = 32
_STEPS = 16


class SlideAnswer:
    """A question about a slide and the model's answer, whose dependence on tiles can be measured.

    Args:
        assistant: Model of slides.
        bag: Tiles of the slide.
        question: Question text.
        max_new_tokens: Maximum length of the answer in tokens.

    Attributes:
        bag: Tiles, on the model's device.
        ids: Token ids of the answer, including the end token.
        text: The answer.
    """

    def __init__(
        self, assistant: Assistant, bag: SlideBag, question: str, max_new_tokens: int = 64
    ) -> None:
        self.model = assistant.model
        self.bag = bag.to(assistant.device)
        prompt = assistant.encode(question, has_image=True)
        self._prompt = torch.tensor([prompt], device=assistant.device)
        new = self.model.generate_answer(
            self._prompt, [self.bag], **assistant.generation_kwargs(max_new_tokens)
        )[0].tolist()
        ends = [place for place, token in enumerate(new) if token in assistant.stop_ids]
        self.ids = new[: ends[0] + 1] if ends else new
        self.text = assistant.decode(self.ids)

    @torch.no_grad()
    def keep(self, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Asks the question about parts of the slide.

        Args:
            masks: Boolean `(N,)` each, True for kept tiles. A slide without tiles has no answer.

        Returns:
            Probability of the whole answer `(len(masks),)`, and whether the model still gives this
            answer.
        """
        size = max(1, min(_BATCH, _BATCH_TILES // len(self.bag.features)))
        probabilities, same = [], []
        for start in range(0, len(masks), size):
            part = masks[start : start + size]
            filled = [mask for mask in part if mask.any()]
            found = torch.zeros(len(part))
            kept = torch.zeros(len(part), dtype=torch.bool)
            if filled:
                logits = self._logits([self.bag.part(mask) for mask in filled])
                targets = torch.tensor(self.ids, device=logits.device)
                rows = [number for number, mask in enumerate(part) if mask.any()]
                steps = logits.log_softmax(dim=-1)[:, range(len(targets)), targets]
                found[rows] = steps.sum(dim=1).exp().cpu()
                kept[rows] = (logits.argmax(dim=-1) == targets).all(dim=1).cpu()
            probabilities.append(found)
            same.append(kept)
        return torch.cat(probabilities), torch.cat(same)

    def gradient(self, bag: SlideBag) -> Tensor:
        """Returns the gradient `(N, E)` of the answer's log-odds with respect to tile features."""
        inputs = bag.features.float().detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits([bag._replace(features=inputs)])[0]
            targets = torch.tensor(self.ids, device=logits.device)[:, None]
            chosen = logits.gather(1, targets)
            others = logits.scatter(1, targets, -torch.inf).logsumexp(dim=1, keepdim=True)
            (gradient,) = torch.autograd.grad((chosen - others).sum(), inputs)
        return gradient

    def _logits(self, bags: list[SlideBag]) -> Tensor:
        """Returns the float32 logits `(B, len(ids), vocabulary)` that predict the answer."""
        answer = torch.tensor([self.ids], device=self._prompt.device)
        ids = torch.cat([self._prompt, answer], dim=1).expand(len(bags), -1)
        inputs = self.model.prepare_inputs(ids, bags)
        logits = self.model.llm(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
        ).logits
        return logits[:, -len(self.ids) - 1 : -1].float()


@dataclass(frozen=True)
class Evidence:
    """Tiles that an answer depends on, and how it was measured.

    Attributes:
        scores: `(N,)` scores of the tiles in the whole slide; see `integrated_gradients`.
        cited: Indices `(k,)` of the cited tiles in the order of removal: the fewest whose removal
            changes the answer; empty if removing up to `MAX_SHARE` of the tiles does not change it.
        probability: Probability of the answer on the whole slide.
        probability_without: The same without the cited tiles.
        random_changes: Number of trials in which removing `k` random tiles changes the answer.
        trials: Number of trials.
    """

    scores: Tensor
    cited: Tensor
    probability: float
    probability_without: float = 1.0
    random_changes: int = 0
    trials: int = 0

    @property
    def is_told(self) -> bool:
        """Whether removing the cited tiles changes the answer and removing random ones does not."""
        return bool(len(self.cited)) and self.random_changes <= MAX_RANDOM * self.trials

    def __str__(self) -> str:
        count = len(self.scores)
        if not len(self.cited):
            share = f"{MAX_SHARE:.0%}"
            return f"cannot be told: without up to {share} of {count} tiles the answer is the same"
        removal = (
            f"removing {len(self.cited)} of {count} tiles changes the answer, removing as many "
            f"random ones in {self.random_changes} of {self.trials} trials"
        )
        return removal if self.is_told else f"cannot be told: {removal}"

    def fields(self) -> dict[str, Any]:
        """Returns JSON values for a row of answers."""
        return {
            "told": self.is_told,
            "tiles": len(self.cited) if self.is_told else 0,
            "of": len(self.scores),
            "probability": self.probability,
            "probability_without": self.probability_without,
            "random_changes": self.random_changes,
            "trials": self.trials,
            "summary": str(self),
        }


def find_evidence(answer: SlideAnswer, *, trials: int = TRIALS, seed: int = 0) -> Evidence:
    """Finds the tiles whose removal changes an answer.

    Tiles are removed in the order of their scores, which are computed again for the tiles that are
    left. The number of random removals that also change the answer tells whether the tiles matter
    or the answer is merely unstable.

    Args:
        answer: Question, slide and answer.
        trials: Number of random removals.
        seed: Seed of the random removals.
    """
    scores, cited = _removals(answer)
    count = len(scores)
    whole, _ = answer.keep([torch.ones(count, dtype=torch.bool)])
    if not len(cited):
        return Evidence(scores, cited, float(whole[0]))
    generator = torch.Generator().manual_seed(seed)
    random = (torch.randperm(count, generator=generator)[: len(cited)] for _ in range(trials))
    parts = [cited, *random]
    probabilities, same = answer.keep([without(count, part) for part in parts])
    changes = int((~same[1:]).sum())
    return Evidence(scores, cited, float(whole[0]), float(probabilities[0]), changes, trials)


def without(count: int, removed: Tensor) -> Tensor:
    """Returns a mask `(count,)` that is False at the indices `removed`."""
    mask = torch.ones(count, dtype=torch.bool)
    mask[removed] = False
    return mask


def integrated_gradients(answer: SlideAnswer, kept: Tensor | None = None) -> Tensor:
    """Scores tiles by integrated gradients of the answer's log-odds (arXiv:1703.01365, eq. 3).

    The path starts from the tiles' mean in every position. This score did best in the deletion and
    insertion tests of `benchmarks/slide_evidence.py`.

    Args:
        answer: Question, slide and answer.
        kept: Boolean `(N,)`, the tiles that are left; all by default.

    Returns:
        `(N,)`, on the CPU; minus infinity for tiles that are not kept.
    """
    bag = answer.bag if kept is None else answer.bag.part(kept)
    features = bag.features.float()
    mean = features.mean(dim=0, keepdim=True)
    total = torch.zeros_like(features)
    for step in range(_STEPS):
        point = mean + (features - mean) * ((step + 0.5) / _STEPS)
        total += answer.gradient(bag._replace(features=point))
    scores = (total * (features - mean)).sum(dim=1).cpu() / _STEPS
    if kept is None:
        return scores
    return torch.full(kept.shape, -torch.inf).masked_scatter(kept, scores)


def _removals(answer: SlideAnswer) -> tuple[Tensor, Tensor]:
    """Returns the scores of all tiles, and the fewest whose removal changes the answer."""
    scores = rest = integrated_gradients(answer)
    count, order = len(scores), torch.empty(0, dtype=torch.long)
    for share in _RESCORED:
        removed, most = len(order), min(count - 1, int(count * share))
        if most <= removed:
            continue
        if removed:
            rest = integrated_gradients(answer, without(count, order))
        order = torch.cat([order, rest.argsort(descending=True)[: most - removed]])
        if number := _fewest(answer, order, removed, count):
            return scores, order[:number]
    return scores, order[:0]


def _fewest(answer: SlideAnswer, order: Tensor, low: int, count: int) -> int:
    """Returns how many of the first tiles must be removed to change the answer; 0 if no number.

    Args:
        answer: Question, slide and answer.
        order: Tiles in the order of their removal.
        low: Number whose removal does not change the answer.
        count: Number of tiles of the slide.
    """
    steps = range((len(order) - low).bit_length() + 1)
    sizes = sorted({min(len(order), low + 2**power) for power in steps})
    _, same = answer.keep([without(count, order[:size]) for size in sizes])
    if bool(same.all()):
        return 0
    place = int((~same).int().argmax())
    low, high = sizes[place - 1] if place else low, sizes[place]
    while high - low > 1:
        middle = (low + high) // 2
        _, same = answer.keep([without(count, order[:middle])])
        low, high = (middle, high) if bool(same[0]) else (low, middle)
    return high
