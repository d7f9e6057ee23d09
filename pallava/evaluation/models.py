"""What an evaluation needs of a model, whether it runs here or behind an endpoint."""

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
    asks them in batches, resumes, and reuses the answers that a folder holds.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that, with prompt and image, determine an answer; weights included."""

    @property
    def batch_matters(self) -> bool:
        """Whether an answer can depend on the questions in its batch, as by padding in bf16."""

    @property
    def reads_slides(self) -> bool:
        """Whether the model takes tile features of whole slides instead of images."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the language model for scores over tokens; None if there is none here."""

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
            keys: Digests of all that the answers depend on, question ids included, for models that
                cache replies.
        """
