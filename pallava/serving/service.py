"""Runs one model for many clients: answers are generated together, behind a bounded queue."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pallava.inference.assistant import Assistant
from pallava.inference.batching import CACHE_BYTES, BatchedAnswers, Request, prepare_images
from pallava.inference.streaming import Completion, Sampling
from pallava.text.turns import Turn

MAX_RUNNING = 32
"""Default number of answers that are generated together."""

MAX_WAITING = 32
"""Default length of the queue behind them."""

_PAUSE_S = 0.5
"""Time for which new prompts are read, up to the end of the last, before answers continue."""

_FIRST_GUESS_S = 5.0
_SMOOTHING = 0.3

_logger = logging.getLogger(__name__)

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
    answer. Answers to one question are generated at the same time.
    """

    def __init__(self, num_answers: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._num_open = num_answers
        self._gone = threading.Event()
        self._withdraw: Callable[[], Any] = lambda: None

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | Completion]]:
        while self._num_open:
            index, event = await self._events.get()
            if self.is_cancelled:
                return
            if isinstance(event, Exception):
                raise event
            self._num_open -= isinstance(event, Completion)
            yield index, event

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._gone.is_set()

    def cancel(self) -> None:
        """Cancels the request: stops after the next token, or drops it if it is still queued.

        Iteration ends at once.
        """
        self._gone.set()
        self._withdraw()
        self._post(0, "")  # wakes the iteration

    def _post(self, index: int, event: str | Completion | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


@dataclass(eq=False)
class _Job:
    """A queued request, or a call of another function.

    Attributes:
        start: Reads the prompt, or calls the function.
        fits: Whether it can start now.
        is_ready: Whether its images are prepared.
    """

    start: Callable[[], Any]
    fits: Callable[[], bool] = lambda: True
    is_ready: bool = True
    started_s: float = 0.0


class ModelService:
    """Owns a model; a single thread does all work on it.

    Args:
        assistant: Model to serve.
        name: Name of the model for clients.
        max_waiting: Maximum number of queued answers behind the running ones.
        max_running: Maximum number of answers that are generated together.
        cache_bytes: See `BatchedAnswers`.
    """

    def __init__(
        self,
        assistant: Assistant,
        name: str,
        max_waiting: int = MAX_WAITING,
        max_running: int = MAX_RUNNING,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.assistant = assistant
        self.name = name
        self.max_waiting = max_waiting
        self.max_running = max_running
        self.started = int(time.time())
        self._batch = BatchedAnswers(assistant, cache_bytes)
        self._changed = threading.Condition()
        self._queue: list[_Job] = []
        self._running: set[_Job] = set()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._preparing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="images")
        self._answer_s = _FIRST_GUESS_S

    @property
    def waiting(self) -> int:
        """Number of queued jobs."""
        return len(self._queue)

    @property
    def capacity(self) -> int:
        """Maximum number of queued and running jobs."""
        return self.max_running + self.max_waiting

    @property
    def num_jobs(self) -> int:
        """Number of queued and running jobs."""
        return len(self._queue) + len(self._running)

    def check_free(self) -> None:
        """Raises early the error that `ask` would raise.

        Raises:
            BusyError: If the queue is full.
        """
        if self.num_jobs >= self.capacity:
            rounds = max(1.0, self.max_waiting / self.max_running)
            raise BusyError(max(1, round(self._answer_s * rounds)))

    def ask(self, turns: Sequence[Turn], sampling: Sampling, num_answers: int = 1) -> Answers:
        """Queues a conversation; the caller must `cancel` the result when it is done with it.

        Args:
            turns: See `pallava.text.turns.check_turns`.
            sampling: Sampling parameters; each further answer adds its index to the seed.
            num_answers: Number of answers, each in its own row of the batch.

        Raises:
            BusyError: If the queue is full.
        """
        answers = Answers(num_answers)
        jobs: list[_Job] = []
        requests = []
        for index in range(num_answers):
            request = Request(
                turns,
                _with_seed(sampling, index),
                on_end=functools.partial(self._end, jobs, answers, index),
                on_text=functools.partial(answers._post, index),
                cancelled=answers._gone.is_set,
            )
            requests.append(request)
            jobs.append(
                _Job(
                    functools.partial(self._batch.start, request),
                    functools.partial(self._batch.fits, request),
                    is_ready=False,
                )
            )
        self._enter(jobs)
        answers._withdraw = functools.partial(self._withdraw, jobs)
        self._preparing.submit(self._prepare, jobs, requests)
        return answers

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs another function that needs the model, between two tokens of the answers.

        Raises:
            BusyError: If the queue is full.
        """
        future: Future[Result] = Future()

        def start() -> None:
            is_wanted = future.set_running_or_notify_cancel()
            result: Any = None
            error: Exception | None = None
            try:
                if is_wanted:
                    result = function(*arguments)
            except Exception as raised:
                error = raised
            self._running.discard(job)
            if error is not None:
                future.set_exception(error)
            elif is_wanted:
                future.set_result(result)

        job = _Job(start)
        self._enter([job])
        future.add_done_callback(lambda _: self._withdraw([job]))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finishes the running answers and drops the queued jobs."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._changed.notify()
        self._preparing.shutdown(wait=True, cancel_futures=True)
        if self._thread is not None:
            self._thread.join()

    def _enter(self, jobs: list[_Job]) -> None:
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the server is stopping")
            self.check_free()
            self._queue += jobs
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="model", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _withdraw(self, jobs: list[_Job]) -> None:
        with self._changed:
            self._queue = [job for job in self._queue if job not in jobs]

    def _prepare(self, jobs: list[_Job], requests: list[Request]) -> None:
        """Preprocesses the images of a question, while the model works for others."""
        if jobs[0] not in self._queue:
            return
        try:
            turns = prepare_images(self.assistant, requests[0].turns)
        except Exception as error:
            for request in requests:
                request.on_end(error)
            return
        for request, job in zip(requests, jobs, strict=True):
            request.turns = turns
            job.is_ready = True
        with self._changed:
            self._changed.notify()

    def _end(
        self, jobs: list[_Job], answers: Answers, index: int, end: Completion | Exception
    ) -> None:
        job = jobs[index]
        if job.started_s:
            self._answer_s += _SMOOTHING * (time.monotonic() - job.started_s - self._answer_s)
        self._withdraw([job])
        self._running.discard(job)
        answers._post(index, end)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._batch.num_running or self._next() or self._is_closed):
                    self._changed.wait()
                if self._is_closed and not self._batch.num_running:
                    return
            try:
                self._advance()
            except Exception as error:  # or all clients would wait forever
                _logger.exception("the running answers are lost")
                self._batch.abort(error)

    def _advance(self) -> None:
        """Reads the prompts that fit, then generates a token of every answer."""
        paused_s = time.monotonic()
        while (job := self._take()) is not None:
            job.start()
            if self._batch.num_running and time.monotonic() - paused_s > _PAUSE_S:
                break
        self._batch.step()

    def _next(self) -> _Job | None:
        """Returns the first job of the queue that is ready."""
        return next((job for job in self._queue if job.is_ready), None)

    def _take(self) -> _Job | None:
        """Takes the first job that is ready, if it fits."""
        with self._changed:
            job = self._next()
            if job is None or self._batch.num_running >= self.max_running or not job.fits():
                return None
            self._queue.remove(job)
            self._running.add(job)
            job.started_s = time.monotonic()
            return job


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None or index == 0:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + index)
