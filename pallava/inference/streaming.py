"""Streams answers while they are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pallava.inference.answer_text import Completion
from pallava.inference.assistant import Assistant
from pallava.inference.batching import BatchedAnswers, ContextError, Request
from pallava.inference.sampling import Sampling
from pallava.text.turns import Turn

__all__ = ["Completion", "ContextError", "Sampling", "converse"]


def converse(
    assistant: Assistant,
    turns: Sequence[Turn],
    sampling: Sampling | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Completion:
    """Answers the last question of a conversation.

    Args:
        assistant: Loaded model.
        turns: Optional system turn, then alternating user and assistant turns.
        sampling: Sampling parameters. The default is greedy, for which a conversation of a single
            question gives the same answer as `Assistant.answer`.
        on_text: Called with each piece of the answer; the concatenated pieces are the answer.
        cancelled: Polled after each token; generation ends once it returns True.

    Raises:
        ContextError: If the conversation is too long for the language model.
        ImageError: If an image cannot be read.
        ConversationError: If the turns do not form a conversation.

    Example::

        turns = [Turn("user", "Is there necrosis?", ("biopsy.png",))]
        converse(model, turns, on_text=lambda text: print(text, end="", flush=True))
    """
    ends: list[Completion | Exception] = []
    batch = BatchedAnswers(assistant, cache_bytes=0)
    batch.start(Request(turns, sampling or Sampling(), ends.append, on_text, cancelled))
    while not ends:
        batch.step()
    if isinstance(ends[0], Exception):
        raise ends[0]
    return ends[0]
