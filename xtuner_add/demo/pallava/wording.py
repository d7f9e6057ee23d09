"""Texts about a slide: captions, questions and answers.

They depend only on the tissues and on the look of the nuclei, never on how a slide was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from xtuner_add.demo.tissue import PATTERNS
from xtuner_add.demo.wording import listed, look

QuestionKind = Literal["tissue", "nuclei", "list", "count", "nuclear look"]
CLOSED: tuple[QuestionKind, ...] = ("tissue", "nuclei")
"""Kinds of questions with yes or no as answer; `nuclei` requires the sub-images."""

NUMBERS = ("no", "one", "two", "three")
_CAPTIONS = (
    "The section shows {tissues}. The nuclei are {look}.",
    "There is {tissues}, with {look} nuclei.",
    "Tissue of {number}: {tissues}. Nuclei: {look}.",
)
CAPTION_REQUESTS = (
    "Describe the image.",
    "What does the image show?",
    "Give a short report.",
)


@dataclass(frozen=True)
class Question:
    """A question about one slide.

    Attributes:
        kind: Kind of the question.
        text: The question.
        answer: The right answer.
    """

    kind: QuestionKind
    text: str
    answer: str

    @property
    def is_closed(self) -> bool:
        """Whether the answer is yes or no."""
        return self.kind in CLOSED


def caption(tissues: Sequence[str], vesicular: bool, rng: np.random.Generator) -> str:
    """Describes a slide; tissues are named in the order of their positions."""
    number = NUMBERS[len(tissues)] + (" kind" if len(tissues) == 1 else " kinds")
    form = _CAPTIONS[rng.integers(len(_CAPTIONS))]
    return form.format(tissues=listed(tissues), look=look(vesicular), number=number)


def overview_caption(tissues: Sequence[str]) -> str:
    """Describes what is visible at low power, where nuclei are too small to judge."""
    return f"Overview of {listed(_in_order(tissues))}."


def field_caption(tissues: Sequence[str], vesicular: bool | None) -> str:
    """Describes one field at high power; `vesicular` is None if there are too few nuclei."""
    nuclei = "Field" if vesicular is None else f"{look(vesicular).capitalize()} nuclei"
    return f"{nuclei}, {listed(_in_order(tissues))}."


def tissue_question(tissue: str, tissues: Sequence[str]) -> Question:
    """Asks whether a tissue is present."""
    if tissue not in PATTERNS:
        raise ValueError(f"tissue {tissue!r} is none of {', '.join(PATTERNS)}")
    return Question("tissue", f"Does the image show {tissue}?", _yes(tissue in tissues))


def nuclei_question(vesicular: bool) -> Question:
    """Asks about the detail that only sub-images show."""
    return Question("nuclei", f"Are the nuclei {look(True)}?", _yes(vesicular))


def open_questions(tissues: Sequence[str], vesicular: bool) -> list[Question]:
    """Returns questions with a word or a list as answer."""
    return [
        Question("list", "Which tissues are there?", listed(tissues)),
        Question("count", "How many kinds of tissue are there?", NUMBERS[len(tissues)]),
        Question("nuclear look", "What do the nuclei look like?", look(vesicular)),
    ]


def _in_order(tissues: Sequence[str]) -> list[str]:
    """Sorts the tissues, so that equal content gives equal captions, which are not negatives."""
    return [name for name in PATTERNS if name in tissues]


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"
