"""Interface between evaluations and models, which run locally or behind an endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pallava.records.questions import ImageSource  # imports Pillow


@dataclass(frozen=True)
class NoAnswer:
    """Why a model gave no answer to a question.

    Attributes:
        reason: Message of the model or of its endpoint.
        is_refusal: Whether the model refused. A refusal is the model's verdict: it counts as a
            wrong answer and the question is not asked again. Otherwise (timeout, exhausted budget)
            the question is skipped, and the next run asks it again.
    """

    reason: str
    is_refusal: bool = False


class Model(Protocol):
    """A model that answers questions about images or slides.

    `pallava.inference.assistant.Assistant` is one; `pallava.evaluation.generation.generate_answers`
    asks them in batches, resumes interrupted runs, and reuses answers in the output folder.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that, with prompt and image, determine an answer; weights included."""

    @property
    def batch_matters(self) -> bool:
        """Whether an answer can depend on the rest of its batch, for example through padding."""

    @property
    def reads_slides(self) -> bool:
        """Whether the model takes tile features of whole slides instead of images."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the language model for scores over tokens; None if it has none locally."""

    def prepare(self, image: ImageSource) -> Any:
        """Loads and preprocesses an image; called from several threads.

        Raises:
            ImageError: If the image cannot be used.
        """

    def answer_prepared(
        self,
        questions: Sequence[str],
        images: Sequence[Any],
        *,
        max_new_tokens: int,
        keys: Sequence[str] = (),
    ) -> Sequence[str | NoAnswer]:
        """Answers a batch of questions.

        Args:
            questions: Texts without image tokens.
            images: Results of `prepare`; None for a question without an image.
            max_new_tokens: Maximum length of each answer in tokens.
            keys: Digests of everything that the answers depend on, including the question ids, for
                models that cache replies.
        """
