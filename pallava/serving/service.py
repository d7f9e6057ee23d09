"""Runs one model, one generation at a time, behind a bounded queue."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pallava.inference.assistant import Assistant
from pallava.inference.streaming import Completion, Sampling, converse
from pallava.text.turns import Turn

MAX_WAITING = 8
"""Default length of the queue; a further request would wait for minutes and is rejected."""

_FIRST_GUESS_S = 5.0
_SMOOTHING = 0.3

Result = TypeVar("Result")


class BusyError(RuntimeError):
    """Raised if the queue is full.

    Attributes:
        retry_after_s: Estimated time in seconds until the queue has space.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the model is busy and its queue full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Answers:
    """Answers that are being generated, as returned by `ModelService.ask`.

    Iteration yields `(index, text)` for every piece, and `(index, Completion)` at the end of an
    answer.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._gone = threading.Event()
        self._withdraw: Callable[[], Any] = lambda: None

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | Completion]]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        """Cancels the request: stops after the next token, or drops it if it is still queued."""
        self._gone.set()
        self._withdraw()

    def _post_text(self, index: int, text: str) -> None:
        self._post((index, text))

    def _post(self, event: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class ModelService:
    """Owns a model and serialises all work on it.

    Args:
        assistant: Model to serve.
        name: Name of the model for clients.
        max_waiting: Maximum number of queued jobs behind the running one.
    """

    def __init__(self, assistant: Assistant, name: str, max_waiting: int = MAX_WAITING) -> None:
        self.assistant = assistant
        self.name = name
        self.max_waiting = max_waiting
        self.started = int(time.time())
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._lock = threading.Lock()
        self._jobs = 0
        self._job_s = _FIRST_GUESS_S

    @property
    def waiting(self) -> int:
        """Number of queued jobs behind the running one."""
        return max(0, self._jobs - 1)

    def check_free(self) -> None:
        """Rejects early what `ask` would reject.

        Raises:
            BusyError: If the queue is full.
        """
        if self._jobs > self.max_waiting:
            raise BusyError(max(1, round(self._job_s * self._jobs)))

    def ask(self, turns: Sequence[Turn], sampling: Sampling, num_answers: int = 1) -> Answers:
        """Queues a conversation; the caller must `cancel` the result when it is done with it.

        Args:
            turns: See `pallava.text.turns.check_turns`.
            sampling: Sampling parameters; each further answer adds its index to the seed.
            num_answers: Number of answers, generated one after another.

        Raises:
            BusyError: If the queue is full.
        """
        answers = Answers()

        def work() -> None:
            try:
                for index in range(num_answers):
                    if answers._gone.is_set():
                        return
                    completion = converse(
                        self.assistant,
                        turns,
                        _with_seed(sampling, index),
                        on_text=functools.partial(answers._post_text, index),
                        cancelled=answers._gone.is_set,
                    )
                    answers._post((index, completion))
                answers._post(None)
            except Exception as error:  # passed to the caller, which runs in another thread
                answers._post(error)

        future = self._submit(work)
        answers._withdraw = future.cancel
        return answers

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs another function that needs the model.

        Raises:
            BusyError: If the queue is full.
        """
        return await asyncio.wrap_future(self._submit(functools.partial(function, *arguments)))

    def close(self) -> None:
        """Finishes the running job and drops the queued ones."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _submit(self, work: Callable[[], Any]) -> Any:
        with self._lock:
            self.check_free()
            self._jobs += 1

        def timed() -> Any:
            start = time.monotonic()
            try:
                return work()
            finally:
                self._job_s += _SMOOTHING * (time.monotonic() - start - self._job_s)

        try:
            future = self._worker.submit(timed)
        except RuntimeError:
            self._leave()
            raise
        future.add_done_callback(lambda _: self._leave())  # also called for cancelled jobs
        return future

    def _leave(self) -> None:
        with self._lock:
            self._jobs -= 1


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None or index == 0:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + index)
