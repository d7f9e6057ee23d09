"""Runs jobs over millions of rows in parts: constant memory, resumable, shared by machines.

Input rows are divided into parts of equal length. The result of a part is a file in `OUT/.parts`
that is written atomically. A later run processes only missing parts, and at the end all parts are
joined in order. The outputs thus depend neither on interruptions nor on the number of machines.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pathcore.files import (
    OutputExistsError,
    StrPath,
    atomic_file,
    folder_lock,
    staged_files,
    write_json,
)
from pathcore.rows import encode_row

PARTS_NAME = ".parts"
_INPUTS = "inputs.json"
_Row = TypeVar("_Row")


@dataclass
class Part:
    """Result of one part.

    Attributes:
        rows: Rows to append, by output file name.
        counts: Counts to be summed over all parts.
        notes: Further results, which the caller's `report` combines.
    """

    rows: dict[str, list[Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    notes: Any = None


@dataclass
class Joined:
    """Combined results of all parts.

    Attributes:
        counts: Sums of the parts' counts.
        notes: Notes of the parts that have any, in order.
    """

    counts: Counter[str]
    notes: list[Any]


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count` (from 0): the parts that one of several machines processes."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count}: 0/{self.count} up to "
                             f"{self.count - 1}/{self.count} expected")  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parses `INDEX/COUNT`.

        Raises:
            ValueError: If the text does not have this form.

        Example:
            >>> Shard.parse("3/8")
            Shard(index=3, count=8)
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise ValueError(f"shard {text!r}: expected INDEX/COUNT, as 0/4")
        return cls(int(index), int(count))


def run_in_parts(
    rows: Iterable[_Row],
    handle: Callable[[Sequence[_Row]], Part],
    out: StrPath,
    *,
    inputs: Mapping[str, Any],
    report_name: str,
    names: Sequence[str],
    report: Callable[[Joined, Path], dict[str, Any]],
    part_rows: int = 10_000,
    shard: Shard | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any] | None:
    """Processes rows part by part and joins the results to files in `out`.

    Args:
        rows: Input rows, in an order that is the same on every run.
        handle: Processes the rows of one part.
        out: Output folder; created if necessary.
        inputs: JSON values that the outputs depend on; parts made from other inputs are not reused.
        report_name: JSON file that is written last and marks the job as finished.
        names: Output files; those without rows are written empty.
        report: Builds the report from the combined results and the folder of joined files, to which
            it may add further files.
        part_rows: Number of rows per part.
        shard: Shard to process; parts are then not joined.
        progress: Called with the number of rows of each part.

    Returns:
        The report; None for a shard.

    Raises:
        OutputExistsError: If `out` holds something else, or another process is working on it.
    """
    out = Path(out)
    inputs = {**json.loads(json.dumps(inputs)), "part_rows": part_rows}
    if (finished := _finished(out, report_name, inputs)) is not None:
        return finished
    parts = out / PARTS_NAME
    parts.mkdir(parents=True, exist_ok=True)
    with _locked(parts, shard):
        _accept(parts, inputs, shard)
        count = 0
        rows = iter(rows)
        while batch := list(islice(rows, part_rows)):
            mine = shard is None or count % shard.count == shard.index
            path = parts / f"{count:08d}.jsonl"
            if mine and not path.is_file():
                _write_part(path, handle(batch))
            count += 1
            progress(len(batch))
        if shard is not None:
            return None
        paths = [parts / f"{number:08d}.jsonl" for number in range(count)]
        with staged_files(out, last=report_name) as stage:
            joined = _join(paths, stage, names)
            content = {**report(joined, stage), "inputs": inputs}
            write_json(stage / report_name, content)
    shutil.rmtree(parts)
    return content


@contextmanager
def _locked(parts: Path, shard: Shard | None) -> Iterator[None]:
    with ExitStack() as stack:
        out = parts.parent
        stack.enter_context(folder_lock(parts / ".lock", folder=out, shared=shard is not None))
        if shard is not None:
            own = parts / f".lock-{shard.index}-of-{shard.count}"
            stack.enter_context(folder_lock(own, folder=out))
        yield


def _finished(out: Path, report_name: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    path = out / report_name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if isinstance(content, dict) and content.get("inputs") == inputs:
        shutil.rmtree(out / PARTS_NAME, ignore_errors=True)  # left by a kill after joining
        return content
    raise OutputExistsError(
        f"{out}: holds the result of other data or options already; name a new folder, or remove it"
    )


def _accept(parts: Path, inputs: Mapping[str, Any], shard: Shard | None) -> None:
    path = parts / _INPUTS
    found = json.loads(path.read_bytes()) if path.is_file() else None
    if found == inputs:
        return
    if found is not None and shard is not None:
        raise OutputExistsError(
            f"{parts}: holds parts of other data or options, perhaps of another shard; give all "
            "shards the same options, or remove the folder"
        )
    if found is not None:
        for stale in parts.glob("*.jsonl"):
            stale.unlink()
    mine = path.with_name(f"{_INPUTS}.{shard.index if shard else 'all'}")
    write_json(mine, inputs)
    os.replace(mine, path)  # concurrent shards write the same content


def _write_part(path: Path, part: Part) -> None:
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.write(encode_row({"counts": part.counts, "notes": part.notes}))
        for name, rows in part.rows.items():
            for row in rows:
                file.write(f"{name}\t".encode() + encode_row(row))


def _join(paths: Sequence[Path], folder: Path, names: Sequence[str]) -> Joined:
    joined = Joined(Counter(), [])
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        for path in paths:
            with path.open("rb") as lines:
                head = json.loads(next(lines))
                joined.counts.update(head["counts"])
                if head["notes"] is not None:
                    joined.notes.append(head["notes"])
                for line in lines:
                    name, _, row = line.partition(b"\t")
                    files[name.decode()].write(row)
    return joined
