"""Answers word by word while they are generated."""

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

_UNFINISHED = "\ufffd"  # bytes of a character whose other bytes are still to come
_LAST_SPACE = re.compile(r"\s(?=\S*$)")
_JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""What `clean_up_tokenization` of transformers joins to the word before."""
_IDEOGRAPHS = ("\u2e80", "\u9fff")  # scripts without spaces between words


_COLDEST = 1e-4


@dataclass(frozen=True)
class Sampling:
    """How words are chosen and when to end.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest word each time, as `Assistant.answer`.
        top_p: Choose among the likeliest words that together have this probability.
        seed: For repeatable choices; by default a new one each time.
        stop: Texts before which the answer ends.

    Raises:
        ValueError: A value outside its range.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest word is taken each time.

        So it is at temperatures close to 0 as well, by which logits cannot be divided: they would
        become infinite.
        """
        return self.temperature < _COLDEST

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: at least 1 expected, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature: 0 to 2 expected, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: above 0, at most 1 expected, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: 0 to 2^63 - 1 expected, got {self.seed}")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every answer before it begins")


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        text: The answer.
        finish_reason: `stop` at its end, `length` at `max_new_tokens`, or `cancelled`.
        prompt_tokens: What the language model read, visual tokens included.
        completion_tokens: What it wrote.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class ContextError(ValueError):
    """A conversation longer than the language model can read."""


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
        assistant: The model.
        turns: A system text or none, then questions and answers in turn.
        sampling: By default greedy: a conversation of one question gives `Assistant.answer`.
        on_text: Called with every piece of the answer; the pieces joined are the answer.
        cancelled: Asked after every token; True ends the answer.

    Raises:
        ContextError: The conversation is too long.
        ImageError: An image that cannot be read.
        ValueError: Turns that do not make a conversation.

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
    """Longest sequence of the language model, if it states one."""
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
    for name in ("stop_strings", "tokenizer"):  # the listener looks for them
        kwargs.pop(name, None)
    if not sampling.is_greedy:
        kwargs |= {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,  # transformers would keep 50 words
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
    """Sees the ids after every step: passes text on, and says when to end."""

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
        """Returns `(1,)`, True to end."""
        self._was_cancelled = self._cancelled()
        text, stopped = self._text(input_ids[0].tolist())
        if not stopped:
            self._give(_settled(text, self._pending))
        return torch.full((1,), stopped or self._was_cancelled, device=input_ids.device)

    def finish(self, new_ids: list[int], prompt_tokens: int) -> Completion:
        """Passes the rest on."""
        text, stopped = self._text(new_ids)
        self._give(text)
        reason: FinishReason = "length"
        if stopped or (new_ids[-1:] and new_ids[-1] in self._assistant.stop_ids):
            reason = "stop"
        elif self._was_cancelled:
            reason = "cancelled"
        return Completion(text, reason, prompt_tokens, len(new_ids))

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        """The answer so far, and whether a stop text ended it."""
        text = self._assistant.decode(ids)
        places = [place for word in self._stop if (place := text.find(word)) >= 0]
        stopped = bool(places) or self._assistant.has_stop_string(ids)
        return text[: min(places, default=len(text))], stopped

    def _give(self, text: str) -> None:
        if self._on_text is not None and len(text) > len(self._given):
            self._on_text(text[len(self._given) :])
            self._given = text


def _settled(text: str, pending: Sequence[str]) -> str:
    """The part of an unfinished answer that the next tokens cannot change.

    Args:
        text: The answer so far.
        pending: Texts that change it once they are complete.
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
