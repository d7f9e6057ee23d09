"""Runs an agent on JSON lines: asks a model about each row and writes new rows in the same order.

Replies are cached as they arrive, so that an interrupted run continues where it stopped and pays
for nothing twice. The output appears at the end, complete; skipped rows and the reasons are written
to a file next to it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pathcore.chat_asking import NO_REQUEST, Asker, Task, settle_from_cache
from pathcore.chat_backends import Backend, Request
from pathcore.chat_budget import Budget, Spent
from pathcore.chat_cache import ReplyCache
from pathcore.files import StrPath, check_name
from pathcore.images import find_image, path_inside, relative_name
from pathcore.rows import (
    encode_row,
    read_rows_with_id,
    row_digest,
    row_files,
    source_and_target,
)
from pathgen.agents.prompts import Prompt
from pathgen.agents.replies import read_reply

_WINDOW = 16
"""Rows in memory per request in flight. Output is ordered, so one slow reply blocks later rows;
this is how far the others may run ahead of it."""

_EXTRACTED_SUFFIXES = (".png", ".jpg", ".webp")
"""Formats in which `xtuner-add extract` writes patches, which it names after the row's id."""


class Rejected(Exception):
    """Raised if the model judges a row to be unusable; the message gives the reason."""


@dataclass(frozen=True)
class Step:
    """An agent's treatment of a row.

    Attributes:
        name: Name, for provenance and reports.
        prompts: Prompts by name.
        read: Checks a parsed reply and returns its value, or raises `ReplyError`.
        finish: Maps `(row, prompt name, value)` to the new row, or raises `Rejected`.
        choose: Returns the names of the prompts to use for a row; by default all are used.
        requires: Text fields that a row must have.
        with_image: Whether the model sees the row's image.
        settings: Other settings that affect the output, for the provenance.
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
    """Outcome of a step.

    Attributes:
        counts: Counts of `rows`, `written`, `from cache`, `rejected`, `failed`, `not asked`.
        spent: Cost and tokens, including those of earlier runs with the same cache.
        skipped: File of the skipped rows, with reasons.
        examples: The first reasons.
    """

    counts: Counter[str]
    spent: Spent
    skipped: Path
    examples: list[str]

    @property
    def complete(self) -> bool:
        """Whether every row was written or rejected on its merits."""
        return not (self.counts["failed"] or self.counts["not asked"])


def skipped_path(out: StrPath) -> Path:
    """Returns the path of the file in which a step records the rows that it skipped."""
    out = Path(out)
    return out.with_name(f"{out.stem}.skipped.jsonl")


def run_step(
    step: Step,
    backend: Backend,
    source: StrPath,
    out: StrPath,
    *,
    images: StrPath | None = None,
    budget: Budget | None = None,
    cache: StrPath | None = None,
    attempts: int = 2,
    progress: bool = True,
) -> StepReport:
    """Asks about every row of `source` and writes `out`.

    Args:
        step: Step to run.
        backend: Model to ask.
        source: JSON lines with an `id` and the fields that the prompt names. Without `image`, the
            file is found by the id, as `xtuner-add extract` names patches.
        out: JSON lines; the file appears when the step is complete. Skipped rows are recorded in
            `skipped_path(out)`.
        images: Folder that the rows' `image` is relative to; by default the folder of `source`.
        budget: Prices and limits.
        cache: SQLite file of replies; by default next to `out`.
        attempts: Maximum number of requests for one usable reply.
        progress: Whether to show a progress bar.

    Raises:
        AgentError: If the model rejects the key, does not exist, or stops answering.
        FileNotFoundError: If `source` or the folder of images is missing.
        ValueError: If `out` is `source`, or another run is writing `out`, or there are no rows.
    """
    source, out = source_and_target(source, out)
    folder = Path(images) if images else source.parent
    if step.with_image and not folder.is_dir():
        raise FileNotFoundError(f"images {folder}: no such folder")
    cache_path = Path(cache) if cache else out.with_name(f"{out.stem}.cache.sqlite")
    counts: Counter[str] = Counter()
    examples: list[str] = []
    with (
        row_files(out, skipped_path(out)) as (rows_file, skipped_file),
        closing(ReplyCache(cache_path)) as replies,
        tqdm(desc=step.name, unit="row", disable=not progress) as bar,
    ):
        run = _Run(step, backend, folder, replies)
        asker = Asker(backend, replies, budget or Budget(), attempts, run.read)
        for task in _tasks_in_order(run.tasks(source), asker, backend):
            bar.update()
            counts["rows"] += 1
            if task.state == "done":
                if task.from_cache:
                    counts["from cache"] += 1
                try:
                    rows_file.write(encode_row(run.finish(task)))
                    counts["written"] += 1
                    continue
                except Rejected as error:
                    task.state, task.reason = "rejected", str(error)
            counts[task.state] += 1
            entry = {"line": task.line, "id": task.row_id, "kind": task.state}
            skipped = {**entry, "reason": task.reason}
            skipped_file.write(encode_row(skipped))
            if len(examples) < 3:
                examples.append(f"line {task.line}, {task.row_id}: {task.reason}")
        if not counts["rows"]:  # before the files appear
            raise ValueError(f"{source}: holds no rows")
        spent = replies.spent()
    return StepReport(counts, spent, skipped_path(out), examples)


def _tasks_in_order(tasks: Iterator[Task], asker: Asker, backend: Backend) -> Iterator[Task]:
    """Yields finished tasks in their original order while many are in flight."""
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
    """Turns rows into tasks and finished tasks into rows."""

    def __init__(self, step: Step, backend: Backend, folder: Path, cache: ReplyCache) -> None:
        self.step = step
        self.backend = backend
        self.folder = folder
        self.cache = cache
        self.parameters = {**backend.sampling.parameters(), **step.settings}

    def tasks(self, source: Path) -> Iterator[Task]:
        """Yields one task per row and prompt; tasks with a cached reply are finished."""
        for line, row in read_rows_with_id(source):
            if isinstance(row, str):
                yield Task(line, "", {}, "", NO_REQUEST, "", state="failed", reason=row)
                continue
            names = self.step.choose(row) if self.step.choose else list(self.step.prompts)
            for name in names:
                yield self._task(line, row, name)

    def read(self, task: Task, text: str) -> Any:
        """Parses and checks a reply."""
        return self.step.read(read_reply(text, self.step.prompts[task.prompt].schema))

    def finish(self, task: Task) -> dict[str, Any]:
        """Returns the new row, including its provenance."""
        image: Any = task.request.image  # a path in these steps
        named = {"image": relative_name(self.folder, Path(image))} if image else {}
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
        settle_from_cache([task], self.cache, self.read)
        return task

    def _request(self, row: Mapping[str, Any], prompt: Prompt) -> Request:
        for name in self.step.requires:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{name}: expected text, found {row.get(name)!r:.80}")
        if not isinstance(row.get("provenance", []), list):
            raise ValueError(f"provenance: expected a list, found {row['provenance']!r:.80}")
        if not isinstance(row.get("versions") or {}, dict):
            raise ValueError(f"versions: expected an object, found {row['versions']!r:.80}")
        image, digest = None, None
        if self.step.with_image:
            if row.get("image") is not None:
                image = path_inside(self.folder, row["image"])
            else:
                image = find_image(
                    self.folder, check_name(row["id"], room_bytes=5), _EXTRACTED_SUFFIXES
                )
            try:
                digest = hashlib.sha256(image.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"image {image.name!r:.200}: {error.strerror}") from error
        return Request(prompt.system, prompt.fill(row), image, digest, prompt.schema)
