"""Continuous batching: answers join and leave a running batch between two tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pallava.inference.answer_text import AnswerText, Completion, FinishReason
from pallava.inference.assistant import Assistant
from pallava.inference.key_values import SLACK, KeptConversations, KeyValues, LayerStates
from pallava.inference.sampling import Sampling, choose_tokens
from pallava.modeling.llava import accepts
from pallava.text.encoding import IMAGE_TOKEN_INDEX, ConversationError
from pallava.text.turns import Turn

CACHE_BYTES = 4 << 30
"""Default limit on keys and values of running answers and kept conversations together."""

_logger = logging.getLogger(__name__)


class ContextError(ConversationError):
    """Raised when a conversation exceeds the context length of the language model."""


@dataclass(eq=False)
class Request:
    """One answer to be generated.

    Attributes:
        turns: See `pallava.text.turns.check_turns`.
        sampling: Sampling parameters and stop conditions.
        on_end: Called with the finished answer, or with the error that ended it.
        on_text: Called with each piece of the answer; the concatenated pieces are the answer.
        cancelled: Polled after each token; generation ends once it returns True.
        ids: Prompt with image tokens; set when the request is first examined.
    """

    turns: Sequence[Turn]
    sampling: Sampling
    on_end: Callable[[Completion | Exception], None]
    on_text: Callable[[str], None] | None = None
    cancelled: Callable[[], bool] = lambda: False
    ids: list[int] | None = field(default=None, init=False)


@dataclass(eq=False)
class _Answer:
    """A request in progress.

    Attributes:
        units: Prompt: token ids of text, and digests of images.
        images: Preprocessed images in reading order.
        prompt_tokens: Length of the prompt, visual tokens included.
        max_new_tokens: Limit on new tokens, so that the context length is not exceeded.
    """

    request: Request
    units: list[Hashable]
    images: list[Any]
    text: AnswerText
    generator: random.Random
    prompt_tokens: int = 0
    max_new_tokens: int = 0


@dataclass
class BatchedAnswers:
    """Generates any number of answers concurrently, one token of each at a time.

    Each prompt is processed separately when its answer joins. The beginning of a conversation
    (system text, images, earlier turns) is not processed again while its keys and values are kept.
    Answers equal those of a batch of one, up to the rounding of kernels whose order of summation
    depends on the shape of the batch. Not thread-safe.

    Args:
        assistant: Loaded model.
        cache_bytes: Limit on keys and values. Running answers have priority, and conversations are
            kept in the remaining space; 0 keeps none. A single answer may exceed the limit.

    Raises:
        ValueError: If the language model keeps a state other than keys and values.
    """

    assistant: Assistant
    cache_bytes: int = CACHE_BYTES
    _running: list[_Answer] = field(default_factory=list, init=False)
    _interrupted: deque[_Answer] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        llm = self.assistant.model.llm
        if getattr(llm, "_is_stateful", False):
            raise ValueError(
                f"{type(llm).__name__}: keeps a recurrent state, which batches cannot share; "
                "expected a language model with attention in all layers"
            )
        names = ("position_ids", "cache_position", "logits_to_keep")
        self._accepted = {name for name in names if accepts(llm, name)}
        self._batch = KeyValues()
        self._kept = KeptConversations()
        self._bytes_per_token = 0
        self._visual_tokens = 0
        self._most_rows: int | None = None  # set when a larger batch has failed

    @property
    def num_running(self) -> int:
        """Number of answers in progress."""
        return len(self._running) + len(self._interrupted)

    def fits(self, request: Request) -> bool:
        """Returns whether an answer of full length fits next to the running ones."""
        if not self._running:
            return not self._interrupted
        if self._interrupted or len(self._running) == self._most_rows:
            return False
        try:
            ids = self._encode(request)
        except Exception:
            return True  # `start` reports it
        num_images = ids.count(IMAGE_TOKEN_INDEX)
        length = len(ids) + num_images * self._visual_tokens + request.sampling.max_new_tokens
        for answer in self._running:
            length = max(length, answer.prompt_tokens + answer.max_new_tokens)
        needed = (len(self._running) + 1) * (length + SLACK) * self._bytes_per_token
        return needed <= self.cache_bytes

    def start(self, request: Request) -> None:
        """Reads a prompt and generates the first token of its answer."""
        try:
            answer = self._open(request)
        except Exception as error:
            request.on_end(error)
        else:
            self._join(answer)

    @torch.no_grad()
    def step(self) -> None:
        """Generates the next token of every answer in progress."""
        while self._interrupted and len(self._running) != self._most_rows:
            self._join(self._interrupted.popleft())
        if not self._running:
            return
        try:
            going_on = self._extend(self._running, self._next_logits())
        except Exception as error:
            self._interrupt(error)
            return
        for row in reversed(range(len(going_on))):  # the last row takes the place of a removed one
            if not going_on[row]:
                self._leave(row)

    def abort(self, error: Exception) -> None:
        """Ends every answer in progress with an error, and forgets the kept conversations."""
        answers = [*self._running, *self._interrupted]
        self._running, self._batch = [], KeyValues()
        self._interrupted.clear()
        self._kept = KeptConversations()
        for answer in answers:
            answer.request.on_end(error)

    def _open(self, request: Request) -> _Answer:
        """Encodes a conversation."""
        assistant, sampling = self.assistant, request.sampling
        images = [assistant.pixel_values(image) for turn in request.turns for image in turn.images]
        ids = self._encode(request)
        if ids.count(IMAGE_TOKEN_INDEX) != len(images):  # a chat template may drop or repeat turns
            raise ConversationError(
                f"the prompt holds {ids.count(IMAGE_TOKEN_INDEX)} image mark(s) for {len(images)} "
                "image(s); expected a prompt template that writes every turn once"
            )
        digests = iter([_digest(image) for image in images])
        return _Answer(
            request,
            [next(digests) if token == IMAGE_TOKEN_INDEX else token for token in ids],
            images,
            AnswerText(assistant, sampling.stop, request.on_text),
            random.Random(sampling.seed),
        )

    def _encode(self, request: Request) -> list[int]:
        if request.ids is None:
            try:
                request.ids = self.assistant.encode_turns(request.turns)
            except ValueError as error:  # told apart from errors of the model itself
                raise ConversationError(str(error)) from error
        return request.ids

    @torch.no_grad()
    def _join(self, answer: _Answer) -> None:
        try:
            states, logits = self._read(answer)
            if not self._extend([answer], logits)[0]:
                return
        except Exception as error:
            answer.request.on_end(error)
            return
        self._running.append(answer)
        try:
            self._batch.append(states)
        except Exception as error:
            self._interrupt(error)
        self._kept.shrink(self._free_bytes)

    def _read(self, answer: _Answer) -> tuple[KeyValues, Tensor]:
        """Processes a prompt, and the tokens generated so far if the answer was interrupted.

        Returns:
            Keys and values, and the logits `(1, vocabulary)` of the next token.
        """
        assistant, model = self.assistant, self.assistant.model
        units = [*answer.units, *answer.text.ids]
        states, num_units = self._kept.find(units[:-1])  # the logits need a token to read
        num_read = self._num_tokens(units[:num_units])
        new = units[num_units:]
        ids = [token if isinstance(token, int) else IMAGE_TOKEN_INDEX for token in new]
        num_images = ids.count(IMAGE_TOKEN_INDEX)
        images = answer.images[len(answer.images) - num_images :]
        embeds = model.prepare_inputs(
            torch.tensor([ids], device=assistant.device),
            [image.to(assistant.device) for image in images] or None,
        ).inputs_embeds
        if num_images:
            self._visual_tokens = (embeds.shape[1] - len(ids)) // num_images + 1
        length = num_read + embeds.shape[1]
        if not answer.prompt_tokens:
            answer.prompt_tokens = length
            answer.max_new_tokens = self._fitting(length, answer.request.sampling.max_new_tokens)
        key_values = KeyValues(length, states, num_read)
        logits = self._forward(key_values, inputs_embeds=embeds)
        self._bytes_per_token = key_values.bytes_per_token
        self._keep(units, key_values.states(0))
        return key_values, logits

    def _next_logits(self) -> Tensor:
        """Reads the last token of every running answer; returns logits `(rows, vocabulary)`."""
        ids = [answer.text.ids[-1:] for answer in self._running]
        self._batch.make_room()
        return self._forward(self._batch, input_ids=torch.tensor(ids, device=self.assistant.device))

    def _forward(self, states: KeyValues, **tokens: Tensor) -> Tensor:
        llm, device = self.assistant.model.llm, self.assistant.device
        num_new = next(iter(tokens.values())).shape[1]
        lengths = torch.tensor(states.lengths, device=device)[:, None]
        columns = torch.arange(states.width + num_new, device=device)
        optional = {
            "position_ids": lengths + torch.arange(num_new, device=device),
            "cache_position": columns[states.width :],
            "logits_to_keep": 1,
        }
        logits: Tensor = llm(
            **tokens,
            attention_mask=(columns >= states.width - lengths).long(),
            past_key_values=states,
            use_cache=True,
            **{name: optional[name] for name in self._accepted},
        ).logits
        states.advance(num_new)
        return logits[:, -1].float()

    def _extend(self, answers: list[_Answer], logits: Tensor) -> list[bool]:
        """Chooses a token per answer; returns which answers continue."""
        # Otherwise NaN would select an arbitrary token or fail the whole batch.
        is_finite = logits.max(dim=-1).values.isfinite()
        logits = torch.where(is_finite[:, None], logits, torch.zeros_like(logits))
        tokens = choose_tokens(
            logits,
            [answer.request.sampling for answer in answers],
            [answer.generator for answer in answers],
        )
        return [
            self._take(answer, token if finite else None)
            for answer, token, finite in zip(answers, tokens, is_finite.tolist(), strict=True)
        ]

    def _take(self, answer: _Answer, token: int | None) -> bool:
        """Adds a token to an answer; returns whether the answer continues."""
        request, text = answer.request, answer.text
        try:
            if token is None:
                raise FloatingPointError("the language model gives logits that are not finite")
            reason: FinishReason | None = "stop" if text.add(token) else None
            if request.cancelled():
                reason = reason or "cancelled"
            elif len(text.ids) >= answer.max_new_tokens:
                reason = reason or "length"
            if reason is None:
                return True
            completion = Completion(text.finish(), reason, answer.prompt_tokens, len(text.ids))
            request.on_end(completion)
        except Exception as error:
            request.on_end(error)
        return False

    def _leave(self, row: int) -> None:
        answer = self._running[row]
        units = [*answer.units, *answer.text.ids[:-1]]  # the last token was not read
        self._keep(units, self._batch.states(row))
        self._batch.remove(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _interrupt(self, error: Exception) -> None:
        """Ends the answer that failed, or halves the batch to find it or to save memory."""
        answers, self._running, self._batch = self._running, [], KeyValues()
        if len(answers) == 1:
            self._most_rows = None
            answers[0].request.on_end(error)
            return
        self._most_rows = len(answers) // 2
        _logger.warning(
            "a batch of %d answers failed and continues %d at a time: %s",
            len(answers), self._most_rows, error,
        )  # fmt: skip
        self._interrupted.extendleft(reversed(answers))

    def _keep(self, units: list[Hashable], states: list[LayerStates]) -> None:
        try:
            self._kept.add(units, states, self._free_bytes)
        except torch.OutOfMemoryError:
            self._kept.shrink(0)

    @property
    def _free_bytes(self) -> int:
        return max(0, self.cache_bytes - self._batch.num_bytes)

    def _num_tokens(self, units: Sequence[Hashable]) -> int:
        return sum(1 if isinstance(unit, int) else self._visual_tokens for unit in units)

    def _fitting(self, prompt_tokens: int, max_new_tokens: int) -> int:
        longest = getattr(self.assistant.model.llm.config, "max_position_embeddings", None)
        if longest is None:
            return max_new_tokens
        if prompt_tokens >= longest:
            raise ContextError(
                f"the conversation is {prompt_tokens} tokens long, images included; this language "
                f"model reads {longest}. Start a new conversation"
            )
        return min(max_new_tokens, longest - prompt_tokens)


def prepare_images(assistant: Assistant, turns: Sequence[Turn]) -> list[Turn]:
    """Preprocesses the images of a conversation; may run in another thread."""
    return [
        dataclasses.replace(turn, images=tuple(map(assistant.pixel_values, turn.images)))
        for turn in turns
    ]


def _digest(image: Any) -> bytes:
    """Returns a digest of a preprocessed image or bag of tile features."""
    digest = hashlib.blake2b(digest_size=16)
    for part in [image] if isinstance(image, Tensor) else image:
        if part is not None:
            digest.update(f"{tuple(part.shape)}{part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
