"""Streams answers while they are generated."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from pallava.inference.assistant import MAX_NEW_TOKENS, Assistant
from pallava.text.turns import Turn

FinishReason = Literal["stop", "length", "cancelled"]

_UNFINISHED = "\ufffd"  # a multi-byte character of which only some bytes have been generated
_LAST_SPACE = re.compile(r"\s(?=\S*$)")
_JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Tokens that `clean_up_tokenization` of transformers joins to the preceding word."""
_IDEOGRAPHS = ("\u2e80", "\u9fff")  # scripts without spaces between words

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


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        text: Text of the answer.
        finish_reason: `stop` at the end of the answer, `length` at `max_new_tokens`, or
            `cancelled`.
        prompt_tokens: Number of prompt tokens, visual tokens included.
        completion_tokens: Number of generated tokens.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class ContextError(ValueError):
    """Raised when a conversation exceeds the context length of the language model."""


@torch.no_grad()
def converse(
    assistant: Assistant,
    turns: Sequence[Turn],
    sampling: Sampling | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
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
        ValueError: If the turns do not form a conversation.

    Example::

        turns = [Turn("user", "Is there necrosis?", ("biopsy.png",))]
        converse(model, turns, on_text=lambda text: print(text, end="", flush=True))
    """
    sampling = sampling or Sampling()
    prompt = torch.tensor([assistant.encode_turns(turns)], device=assistant.device)
    images = [image for turn in turns for image in turn.images]
    stacks = [assistant.pixel_values(image).to(assistant.device) for image in images]
    inputs = assistant.model.prepare_inputs(prompt, stacks or None, padding_side="left")
    prompt_tokens = inputs.inputs_embeds.shape[1]
    max_new_tokens = _fitting(assistant, prompt_tokens, sampling.max_new_tokens)
    listener = _Listener(assistant, sampling.stop, on_text, cancelled)
    with _random_choices(assistant, sampling):
        new_ids = assistant.model.llm.generate(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask.long(),
            stopping_criteria=StoppingCriteriaList([listener]),
            **_generation_kwargs(assistant, sampling, max_new_tokens),
        )[0].tolist()
    return listener.finish(new_ids, prompt_tokens)


def context_length(assistant: Assistant) -> int | None:
    """Returns the maximum sequence length of the language model, or None if its config has none."""
    return getattr(assistant.model.llm.config, "max_position_embeddings", None)


def _fitting(assistant: Assistant, prompt_tokens: int, max_new_tokens: int) -> int:
    longest = context_length(assistant)
    if longest is None:
        return max_new_tokens
    if prompt_tokens >= longest:
        raise ContextError(
            f"the conversation is {prompt_tokens} tokens long, images included; this language "
            f"model reads {longest}. Start a new conversation"
        )
    return min(max_new_tokens, longest - prompt_tokens)


def _generation_kwargs(
    assistant: Assistant, sampling: Sampling, max_new_tokens: int
) -> dict[str, Any]:
    kwargs = assistant.generation_kwargs(max_new_tokens)
    for name in ("stop_strings", "tokenizer"):  # _Listener checks for stop strings itself
        kwargs.pop(name, None)
    if not sampling.is_greedy:
        kwargs |= {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,  # disables the top-k of 50 that transformers applies by default
        }
    return kwargs


@contextmanager
def _random_choices(assistant: Assistant, sampling: Sampling) -> Iterator[None]:
    if sampling.is_greedy:
        yield
        return
    devices = [assistant.device] if assistant.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        yield


class _Listener(StoppingCriteria):
    """Stopping criterion that also passes on new text after each generated token."""

    def __init__(
        self,
        assistant: Assistant,
        stop: tuple[str, ...],
        on_text: Callable[[str], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._assistant = assistant
        self._stop = stop
        self._on_text = on_text
        self._cancelled = cancelled or (lambda: False)
        joined = getattr(assistant.tokenizer, "clean_up_tokenization_spaces", False)
        self._pending = (*stop, *assistant.stop_strings, *(_JOINED if joined else ()))
        self._given = ""
        self._was_cancelled = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Returns a bool tensor `(1,)`: True ends generation."""
        self._was_cancelled = self._cancelled()
        text, stopped = self._text(input_ids[0].tolist())
        if not stopped:
            self._give(_settled(text, self._pending))
        return torch.full((1,), stopped or self._was_cancelled, device=input_ids.device)

    def finish(self, new_ids: list[int], prompt_tokens: int) -> Completion:
        """Passes on the remaining text and returns the finished answer."""
        text, stopped = self._text(new_ids)
        self._give(text)
        reason: FinishReason = "length"
        if stopped or (new_ids[-1:] and new_ids[-1] in self._assistant.stop_ids):
            reason = "stop"
        elif self._was_cancelled:
            reason = "cancelled"
        return Completion(text, reason, prompt_tokens, len(new_ids))

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        """Returns the answer so far, and whether a stop string ended it."""
        text = self._assistant.decode(ids)
        places = [place for word in self._stop if (place := text.find(word)) >= 0]
        stopped = bool(places) or self._assistant.has_stop_string(ids)
        return text[: min(places, default=len(text))], stopped

    def _give(self, text: str) -> None:
        if self._on_text is not None and len(text) > len(self._given):
            self._on_text(text[len(self._given) :])
            self._given = text


def _settled(text: str, pending: Sequence[str]) -> str:
    """Returns the part of an unfinished answer that later tokens cannot change.

    Args:
        text: Answer generated so far.
        pending: Strings that alter the text before them once they are complete, such as stop words.
    """
    text = text.rstrip(_UNFINISHED)
    end = len(text)
    if not (text and _IDEOGRAPHS[0] <= text[-1] <= _IDEOGRAPHS[1]):
        space = _LAST_SPACE.search(text)
        end = space.end() if space else 0
    for word in pending:
        for length in range(min(len(word) - 1, len(text)), 0, -1):
            if text.endswith(word[:length]):
                end = min(end, len(text) - length)
                break
    return text[:end].rstrip(_UNFINISHED)
