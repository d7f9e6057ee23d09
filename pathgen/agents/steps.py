"""A step: rows in, a model asked about each, rows out, in the same order.

Replies go to a cache as they come, so that a run that was stopped goes on where it was and nothing
is paid for twice. Rows are written at the end, whole; what was left out stands beside them with
the reason.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pathgen.agents.asking import NO_REQUEST, Asker, Task
from pathgen.agents.backends import Backend, Request
from pathgen.agents.budget import Budget, Spent
from pathgen.agents.cache import ReplyCache
from pathgen.agents.prompts import Prompt
from pathgen.agents.replies import read_reply
from pathgen.rows import find_image, read_rows, row_digest, row_files, write_row

_WINDOW = 16
"""Rows in hand for each one being asked about: how far a slow reply may hold up the others."""


class Rejected(Exception):
    """The model found that a row is of no use; the message says why."""


@dataclass(frozen=True)
class Step:
    """What an agent does to a row.

    Attributes:
        name: For provenance and reports.
        prompts: By name.
        choose: Names of the prompts that a row gets.
        read: Checks a parsed reply and returns its value, or raises `ReplyError`.
        finish: `(row, prompt name, value)` -> the new row, or raises `Rejected`.
        requires: Fields that a row must have, as text.
        with_image: Whether the model sees the row's image.
        settings: What else decides about replies and rows, for provenance.
    """

    name: str
    prompts: Mapping[str, Prompt]
    read: Callable[[Any], Any]
    finish: Callable[[dict[str, Any], str, Any], dict[str, Any]]
    choose: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    requires: tuple[str, ...] = ()
    with_image: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class StepReport:
    """What came of a step.

    Attributes:
        counts: Of `rows`, `written`, `from cache`, `rejected`, `failed`, `not asked`.
        spent: Money and tokens, those of earlier runs with the same cache included.
        left_out: The file with the reasons.
        examples: The first reasons.
    """

    counts: Counter[str]
    spent: Spent
    left_out: Path
    examples: list[str]

    @property
    def complete(self) -> bool:
        """Whether every row was written or rejected on its merits."""
        return not (self.counts["failed"] or self.counts["not asked"])


def left_out_path(out: str | os.PathLike[str]) -> Path:
    """Where a step says what it left out: beside its output."""
    out = Path(out)
    return out.with_name(f"{out.stem}.left_out.jsonl")


def run_step(
    step: Step,
    backend: Backend,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
    cache: str | os.PathLike[str] | None = None,
    attempts: int = 2,
    progress: bool = True,
) -> StepReport:
    """Asks about every row of `source` and writes `out`.

    Args:
        step: What to do.
        backend: Whom to ask.
        source: JSON lines; each has an `id` and what the prompt needs. Where `image` is missing,
            the file is sought by the id, as `xtuner-add extract` names patches.
        out: JSON lines; appears when all is done. What was left out goes to `left_out_path(out)`.
        images: Folder that the rows' `image` is relative to; by default that of `source`.
        budget: Prices and ceilings.
        cache: SQLite file of replies; by default beside `out`.
        attempts: How often a model is asked for a reply that can be used.
        progress: Show a bar.

    Raises:
        AgentError: The model refuses the key, is not there, or no longer answers.
        FileNotFoundError: There is no `source` or no folder of images.
        ValueError: Another run is writing `out`.
    """
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: would replace what is read; name another file")
    folder = Path(images) if images else source.parent
    if step.with_image and not folder.is_dir():
        raise FileNotFoundError(f"images {folder}: no such folder")
    cache_path = Path(cache) if cache else out.with_name(f"{out.stem}.cache.sqlite")
    counts: Counter[str] = Counter()
    examples: list[str] = []
    with (
        row_files(out, left_out_path(out)) as (rows_file, left_out_file),
        closing(ReplyCache(cache_path)) as replies,
        tqdm(desc=step.name, unit="row", disable=not progress) as bar,
    ):
        run = _Run(step, backend, folder, replies)
        asker = Asker(backend, replies, budget or Budget(), attempts, run.read)
        for task in _in_order(run.tasks(source), asker, backend):
            bar.update()
            counts["rows"] += 1
            if task.state == "done":
                if task.from_cache:
                    counts["from cache"] += 1
                try:
                    write_row(rows_file, run.finish(task))
                    counts["written"] += 1
                    continue
                except Rejected as error:
                    task.state, task.reason = "rejected", str(error)
            counts[task.state] += 1
            left = {"line": task.line, "id": task.row_id, "kind": task.state, "reason": task.reason}
            write_row(left_out_file, left)
            if len(examples) < 3:
                examples.append(f"line {task.line}, {task.row_id}: {task.reason}")
        spent = replies.spent()
    return StepReport(counts, spent, left_out_path(out), examples)


def _in_order(tasks: Iterator[Task], asker: Asker, backend: Backend) -> Iterator[Task]:
    """Yields tasks as they were given, each when it is settled; asks many at a time."""
    window: deque[Task] = deque()
    most = _WINDOW * backend.concurrency * backend.batch_size
    with asker:
        for task in tasks:
            window.append(task)
            asker.add(task)
            while len(window) >= most and not window[0].settled:
                asker.wait()
            while window and window[0].settled:
                yield window.popleft()
        asker.flush()
        while window:
            while not window[0].settled:
                asker.wait()
            yield window.popleft()


class _Run:
    """Turns rows into tasks and settled tasks into rows."""

    def __init__(self, step: Step, backend: Backend, folder: Path, cache: ReplyCache) -> None:
        self.step = step
        self.backend = backend
        self.folder = folder
        self.cache = cache
        self.parameters = {**backend.sampling.parameters(), **step.settings}

    def tasks(self, source: Path) -> Iterator[Task]:
        """One task for each row and prompt, those known from the cache settled."""
        for line, row in read_rows(source):
            if isinstance(row, str):
                yield Task(line, "", {}, "", NO_REQUEST, "", state="failed", reason=row)
                continue
            names = self.step.choose(row) if self.step.choose else list(self.step.prompts)
            for name in names:
                yield self._task(line, row, name)

    def read(self, task: Task, text: str) -> Any:
        """The value of a reply, checked."""
        return self.step.read(read_reply(text, self.step.prompts[task.prompt].schema))

    def finish(self, task: Task) -> dict[str, Any]:
        """The new row, with where it comes from."""
        image = task.request.image
        named = {"image": image.relative_to(self.folder).as_posix()} if image else {}
        row = self.step.finish({**task.row, **named}, task.prompt, task.value)
        prompt = self.step.prompts[task.prompt]
        digest = {"image_sha256": task.request.image_sha256} if image else {}
        row["provenance"] = [
            *task.row.get("provenance", []),
            {
                "step": self.step.name,
                "model": self.backend.model,
                "backend": self.backend.kind,
                "endpoint": task.endpoint,
                "prompt": prompt.name,
                "prompt_sha256": prompt.digest,
                "parameters": self.parameters,
                "parents": [{"id": task.row["id"], "sha256": row_digest(task.row)}],
                **digest,
                "request_sha256": task.digest,
            },
        ]
        return row

    def _task(self, line: int, row: dict[str, Any], name: str) -> Task:
        try:
            request = self._request(row, self.step.prompts[name])
        except ValueError as error:
            task = Task(line, row["id"], row, name, NO_REQUEST, "")
            task.state, task.reason = "failed", str(error)
            return task
        digest = request.digest(self.backend.model, self.backend.sampling.parameters())
        task = Task(line, row["id"], row, name, request, digest)
        if (verdict := self.cache.verdict(digest)) is not None:
            task.state, task.reason = "failed", verdict.text
            task.endpoint, task.from_cache = verdict.endpoint, True
            return task
        known = self.cache.get(digest)
        if known is not None:
            try:
                task.settle(self.read(task, known.text), known.endpoint, from_cache=True)
            except ValueError:
                return task  # usable once, but the checks have changed: ask again
        return task

    def _request(self, row: Mapping[str, Any], prompt: Prompt) -> Request:
        for name in self.step.requires:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{name}: expected text, found {row.get(name)!r:.80}")
        if not isinstance(row.get("provenance", []), list):
            raise ValueError(f"provenance: expected a list, found {row['provenance']!r:.80}")
        image, digest = None, None
        if self.step.with_image:
            image = find_image(self.folder, row)
            try:
                digest = hashlib.sha256(image.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"image {image.name!r:.200}: {error.strerror}") from error
        return Request(prompt.system, prompt.fill(row), image, digest, prompt.schema)
