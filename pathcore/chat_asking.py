"""Sends requests to a backend concurrently, with retries, a budget and a cache of replies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pathcore.chat_backends import AgentError, Backend, Reply, Request
from pathcore.chat_budget import Budget, Spent
from pathcore.chat_cache import ReplyCache
from pathcore.chat_replies import ReplyError

MOST_SILENT = 25
"""Number of consecutive requests without a reply after which the endpoint counts as down."""

_CORRECTION = "Your reply cannot be used: {problem}. Reply again, in the form that was asked for."
_CORRECTION_BYTES = 400  # upper bound: the template and the 200 characters of a problem


NO_REQUEST = Request("", "")


@dataclass
class Task:
    """One request about one row, and its outcome.

    Attributes:
        line: Line number of the row.
        row_id: Id of the row.
        row: Fields of the row.
        prompt: Name of the prompt.
        request: The request; `NO_REQUEST` if the row is invalid.
        digest: Digest of the request, the key of the cache.
        state: `open`, `done`, `failed`, `not asked` or `rejected`.
        reason: Why the state is neither `open` nor `done`.
        value: Parsed reply.
        endpoint: Endpoint that replied.
        from_cache: Whether the reply was received by an earlier run.
    """

    line: int
    row_id: str
    row: dict[str, Any]
    prompt: str
    request: Request
    digest: str
    state: Literal["open", "done", "failed", "not asked", "rejected"] = "open"
    reason: str = ""
    value: Any = None
    endpoint: str = ""
    from_cache: bool = False

    @property
    def settled(self) -> bool:
        """Whether the outcome is known."""
        return self.state != "open"

    def settle(self, value: Any, endpoint: str, *, from_cache: bool = False) -> None:
        """Marks the task as done, with the value of its reply."""
        self.state, self.value, self.endpoint = "done", value, endpoint
        self.from_cache = from_cache


@dataclass
class _Outcome:
    text: str = ""
    value: Any = None
    problem: str | None = None
    blame: str = "model"
    spent: Spent = field(default_factory=Spent)


def settle_from_cache(
    tasks: Iterable[Task], cache: ReplyCache, read: Callable[[Task, str], Any]
) -> None:
    """Settles the tasks whose reply, or whose final refusal, is in the cache.

    Args:
        tasks: The tasks.
        cache: Cache.
        read: Maps `(task, text)` to a value, or raises `ValueError` for a reply that was usable
            when it was cached, whose task then stays open.
    """
    for task in tasks:
        if (verdict := cache.verdict(task.digest)) is not None:
            task.state, task.reason = "failed", verdict.text
            task.endpoint, task.from_cache = verdict.endpoint, True
        elif (known := cache.get(task.digest)) is not None:
            with suppress(ValueError):
                task.settle(read(task, known.text), known.endpoint, from_cache=True)


class Asker:
    """Sends tasks to a backend, several batches at a time.

    Args:
        backend: Model that replies.
        cache: Cache; each reply is stored as soon as it arrives.
        budget: Limits on cost and tokens.
        attempts: Maximum number of requests for one usable reply.
        read: Maps `(task, text)` to a value, or raises `ReplyError`.
        patience: Number of requests without a reply at the very beginning after which the endpoint
            counts as down; later it is `MOST_SILENT`.
        silent: Number of requests without a reply directly before, by another `Asker`.

    Attributes:
        silent: Number of consecutive requests without a reply so far.

    Raises:
        AgentError: From `add`, `flush`, `wait` and `finish`, if the backend cannot be used.
    """

    def __init__(
        self,
        backend: Backend,
        cache: ReplyCache,
        budget: Budget,
        attempts: int,
        read: Callable[[Task, str], Any],
        patience: int = MOST_SILENT,
        silent: int = 0,
    ) -> None:
        if attempts < 1:
            raise ValueError("attempts: expected at least one")
        self._backend = backend
        self._cache = cache
        self._budget = budget
        self._attempts = attempts
        self._read = read
        self._spent = cache.spent()
        self._reserved = Spent()
        self._queue: deque[Task] = deque()
        self._running: dict[Future[list[_Outcome]], list[Task]] = {}
        self._same: dict[str, list[Task]] = {}
        self.silent, self._patience = silent, patience
        self._flushing = False
        self._pool = ThreadPoolExecutor(max_workers=backend.concurrency)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for requests in flight and caches their replies, which will be billed anyway."""
        for future in self._running:
            future.cancel()
        self._pool.shutdown(wait=True)
        for future, tasks in self._running.items():
            try:
                outcomes = future.result()
            except (AgentError, CancelledError):
                continue
            for task, outcome in zip(tasks, outcomes, strict=True):
                self._keep(task, outcome)
        self._running.clear()

    def add(self, task: Task) -> None:
        """Queues a task, unless it is finished; tasks with equal requests share a reply."""
        if task.settled:
            return
        if task.digest in self._same:
            self._same[task.digest].append(task)
            return
        self._same[task.digest] = [task]
        self._queue.append(task)
        self._send()

    def flush(self) -> None:
        """Sends incomplete batches too, because no more tasks will be added."""
        self._flushing = True
        self._send()

    def finish(self, progress: Callable[[int], object] = lambda number: None) -> None:
        """Waits until all tasks are finished.

        Args:
            progress: Called with numbers of requests as they are answered.
        """
        self.flush()
        while self._running:
            waiting = len(self._same)
            self.wait()
            progress(waiting - len(self._same))

    def wait(self) -> None:
        """Waits until at least one batch is answered."""
        # Otherwise an incomplete batch would wait for tasks that the blocked caller cannot add.
        flushing, self._flushing = self._flushing, True
        self._send()
        self._flushing = flushing
        if not self._running:
            return
        done = wait(self._running, return_when=FIRST_COMPLETED).done
        for future in done:
            outcomes = future.result()
            settled = list(zip(self._running.pop(future), outcomes, strict=True))
            for task, outcome in settled:
                self._reserved -= self._highest(task)
                self._keep(task, outcome)
            for task, outcome in settled:
                self._settle(task, outcome)
        self._send()

    def _send(self) -> None:
        while self._queue and len(self._running) < self._backend.concurrency:
            if len(self._queue) < self._backend.batch_size and not self._flushing:
                return
            batch: list[Task] = []
            while self._queue and len(batch) < self._backend.batch_size:
                highest = self._highest(self._queue[0])
                if not self._budget.allows(self._spent + self._reserved + highest):
                    break
                self._reserved += highest
                batch.append(self._queue.popleft())
            if batch:
                self._running[self._pool.submit(self._ask, batch)] = batch
            elif self._running:
                return  # a request in flight may cost less than was reserved for it
            else:
                self._give_up(self._queue.popleft())

    def _give_up(self, task: Task) -> None:
        for same in self._same.pop(task.digest):
            same.state, same.reason = "not asked", "the budget is exhausted"

    def _highest(self, task: Task) -> Spent:
        total, request = Spent(), task.request
        limit = self._backend.sampling.max_tokens
        for attempt in range(self._attempts):
            # Earlier replies are sent again. They have at most `limit` tokens, however many bytes.
            earlier = attempt * (limit + _CORRECTION_BYTES)
            total += self._budget.highest(
                text_bytes=request.text_bytes + earlier,
                has_image=request.image is not None,
                max_reply_tokens=limit,
            )
        return total

    def _ask(self, tasks: Sequence[Task]) -> list[_Outcome]:
        """Sends a batch, and repeats requests whose replies are unusable; runs in a thread."""
        outcomes = [_Outcome() for _ in tasks]
        requests = {index: task.request for index, task in enumerate(tasks)}
        for _ in range(self._attempts):
            replies = self._backend.ask(list(requests.values()))
            again = {}
            for (index, request), reply in zip(requests.items(), replies, strict=True):
                outcome = outcomes[index]
                self._judge(tasks[index], reply, outcome)
                outcome.spent += self._price(request, reply)
                if outcome.problem is not None and reply.blame == "model":
                    again[index] = _corrected(request, reply, outcome.problem)
            requests = again
            if not requests:
                break
        return outcomes

    def _judge(self, task: Task, reply: Reply, outcome: _Outcome) -> None:
        outcome.text, outcome.problem, outcome.blame = reply.text, reply.fault, reply.blame
        if reply.fault is None:
            try:
                outcome.value = self._read(task, reply.text)
            except ReplyError as error:
                outcome.problem = str(error)

    def _price(self, request: Request, reply: Reply) -> Spent:
        prompt, words = reply.prompt_tokens, reply.reply_tokens
        if prompt is None or words is None:
            return self._budget.highest(
                text_bytes=request.text_bytes,
                has_image=request.image is not None,
                max_reply_tokens=self._backend.sampling.max_tokens,
            )
        return Spent(self._budget.cost(prompt, words), prompt + words)

    def _keep(self, task: Task, outcome: _Outcome) -> None:
        self._spent += outcome.spent
        self._cache.keep(
            task.digest,
            outcome.text,
            outcome.problem,
            self._backend.endpoint,
            outcome.spent,
            is_final=outcome.blame == "content" and outcome.problem is not None,
        )

    def _settle(self, task: Task, outcome: _Outcome) -> None:
        for same in self._same.pop(task.digest):
            if outcome.problem is None:
                same.settle(outcome.value, self._backend.endpoint)
            else:
                shown = f"; the reply began {outcome.text[:120]!r}" if outcome.text else ""
                same.state, same.reason = "failed", f"{outcome.problem}{shown}"
        if outcome.text or outcome.blame in ("image", "limit", "content"):
            self.silent, self._patience = 0, MOST_SILENT
            return
        self.silent += 1
        if self.silent >= self._patience:
            raise AgentError(
                f"{self._backend.model} at {self._backend.endpoint}: {self.silent} requests in a "
                f"row without a reply; the last: {outcome.problem}"
            )


def _corrected(request: Request, reply: Reply, problem: str) -> Request:
    if not reply.text:
        return request
    correction = _CORRECTION.format(problem=problem[:200])
    return replace(request, earlier=(*request.earlier, (reply.text, correction)))
