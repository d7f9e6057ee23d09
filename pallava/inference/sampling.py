"""How the tokens of an answer are chosen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pallava.inference.assistant import MAX_NEW_TOKENS

# Below this temperature the scaled logits would overflow, so decoding is greedy.
_COLDEST = 1e-4


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters and stop conditions.

    Attributes:
        max_new_tokens: Maximum length of the answer in tokens.
        temperature: Sampling temperature; 0 decodes greedily, as `Assistant.answer` does.
        top_p: Nucleus sampling: tokens are drawn from the smallest set with this total probability.
        seed: Seed for reproducible sampling; random by default.
        stop: Strings at which the answer ends; they are not part of it.

    Raises:
        ValueError: If a value is out of range.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy.

        This includes temperatures close to 0: dividing the logits by them would overflow.
        """
        return self.temperature < _COLDEST

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature: expected 0 to 2, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0, at most 1, found {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1, found {self.seed}")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every answer before it begins")


def choose_tokens(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[random.Random]
) -> list[int]:
    """Chooses the next token of every row.

    A sampled row takes one number from its own generator and inverts the cumulative distribution
    there, so that its choice depends neither on the other rows nor on the device.

    Args:
        logits: `(rows, vocabulary)`, finite.
        samplings: Sampling parameters per row.
        generators: Random generator per row; greedy rows do not use theirs.
    """
    tokens = logits.argmax(dim=-1)
    sampled = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
    if sampled:

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=logits.device)[:, None]

        temperatures = column([samplings[row].temperature for row in sampled])
        top_p = column([samplings[row].top_p for row in sampled])
        draws = column([generators[row].random() for row in sampled])
        probabilities = torch.softmax(logits[sampled] / temperatures, dim=-1)
        probabilities, order = probabilities.sort(dim=-1, descending=True)
        totals = probabilities.cumsum(dim=-1)
        num_kept = (totals - probabilities < top_p).sum(dim=-1, keepdim=True)
        places = torch.searchsorted(totals, draws * totals.gather(1, num_kept - 1), right=True)
        tokens[sampled] = order.gather(1, places.minimum(num_kept - 1)).squeeze(1)
    return tokens.tolist()
