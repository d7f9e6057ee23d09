"""The state of a long job, in the folder it writes: what is done, what was left out and why.

`OUT/.job/` holds the job's settings, a lock, and one record per finished unit of work (a shard, a
slide). A record is written after what it speaks of is in place, so a killed job is continued by
doing the units without record. `finish` joins the records to `OUT/manifest.jsonl`, one row per
input, and sums up in `OUT/report.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pathcore.files import (
    OutputExistsError,
    atomic_file,
    folder_lock,
    remove_partials,
    write_json,
    write_text,
)

WRITTEN, SKIPPED = "written", "skipped"
MANIFEST_NAME, SKIPPED_NAME, REPORT_NAME = "manifest.jsonl", "skipped.jsonl", "report.json"

_JOB, _LOCK = ".job", "lock"


@dataclass
class Report:
    """What became of a job's inputs.

    Attributes:
        written: Inputs whose output is in place.
        skipped: Inputs that were left out; `skipped.jsonl` lists them.
        reasons: How many were left out, by reason.
        notes: Further counts, for instance of patches that reach over the edge.
    """

    written: int = 0
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


class JobFolder:
    """A folder that a job fills, unit by unit; a context manager that holds its lock.

    Args:
        out: The folder.
        inputs: What the job makes of what, as JSON values; another job is refused the folder.
        retry_skipped: Do units again in which an input was left out.

    Raises:
        OutputExistsError: The folder holds something else.
        FolderInUseError: Another process is filling it.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        inputs: Mapping[str, Any],
        *,
        retry_skipped: bool = False,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out / _JOB
        self.inputs = json.loads(json.dumps(inputs))
        self._retry_skipped = retry_skipped
        self._stack = ExitStack()

    def __enter__(self) -> JobFolder:
        if self.out.exists() and not self.out.is_dir():
            raise OutputExistsError(f"{self.out}: a file lies there; name a folder")
        if not self.folder.is_dir() and self.out.is_dir() and any(self.out.iterdir()):
            raise OutputExistsError(f"{self.out}: holds something else already; name a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._stack.enter_context(folder_lock(self.folder / _LOCK, folder=self.out))
            self._check_inputs()
            shutil.rmtree(staging_folder(self.out), ignore_errors=True)
            remove_partials(self.out)
            staging_folder(self.out).mkdir(exist_ok=True)
            _records_folder(self.out).mkdir(exist_ok=True)
            if self._retry_skipped:
                self._forget_skipped()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def done(self) -> dict[str, dict[str, Any]]:
        """Summaries of the finished units, by name."""
        summaries = {}
        for path in sorted(_records_folder(self.out).glob("*.jsonl")):
            with path.open("rb") as file:
                summaries[path.stem] = json.loads(file.readline())
        return summaries

    def finish(self, extra_rows: Iterable[Mapping[str, Any]] = ()) -> Report:
        """Joins the records of all units, and rows about inputs that belong to none.

        Returns:
            The sum, which also stands in `report.json`.
        """
        report, reasons, notes = Report(), Counter[str](), Counter[str]()
        with (
            atomic_file(self.out / MANIFEST_NAME) as manifest_path,
            atomic_file(self.out / SKIPPED_NAME) as skipped_path,
            manifest_path.open("wb") as manifest,
            skipped_path.open("wb") as skipped,
        ):
            for line in chain(self._lines(), map(encode_row, extra_rows)):
                row = json.loads(line)
                manifest.write(line)
                if row["state"] == SKIPPED:
                    skipped.write(line)
                    reasons[row["reason"]] += 1
                else:
                    report.written += 1
                notes.update(row.get("notes", ()))
        report.skipped, report.reasons = sum(reasons.values()), dict(reasons.most_common())
        report.notes = dict(sorted(notes.items()))
        write_json(self.out / REPORT_NAME, asdict(report))
        shutil.rmtree(staging_folder(self.out), ignore_errors=True)
        return report

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all units, as they were recorded."""
        yield from (json.loads(line) for line in self._lines())

    def _lines(self) -> Iterator[bytes]:
        for path in sorted(_records_folder(self.out).glob("*.jsonl")):
            with path.open("rb") as file:
                file.readline()
                yield from file

    def _check_inputs(self) -> None:
        path = self.folder / "job.json"
        if not path.is_file():
            write_json(path, self.inputs)
            return
        found = json.loads(path.read_bytes())
        if found == self.inputs:
            return
        if self._is_untouched():
            for leftover in self.folder.iterdir():
                if leftover.is_file() and leftover.name != _LOCK:
                    leftover.unlink()
            write_json(path, self.inputs)
            return
        names = sorted(n for n in {*found, *self.inputs} if found.get(n) != self.inputs.get(n))
        raise OutputExistsError(
            f"{self.out}: was begun with other settings ({', '.join(names)}: "
            f"{[found.get(n) for n in names]} then, {[self.inputs.get(n) for n in names]} now); "
            "name a new folder, or use the settings it was begun with"
        )

    def _is_untouched(self) -> bool:
        """Whether the job of the folder has not written anything yet."""
        others = (child for child in self.out.iterdir() if child.name != _JOB)
        output = (path for child in others for path in (child, *child.rglob("*")))
        return not any(
            path.is_file() for path in chain(output, _records_folder(self.out).glob("*"))
        )

    def _forget_skipped(self) -> None:
        for name, summary in self.done().items():
            if summary["skipped"]:
                (_records_folder(self.out) / f"{name}.jsonl").unlink()


def staging_folder(out: Path) -> Path:
    """Where the workers of a job build what is not whole yet."""
    return out / _JOB / "staging"


def write_record(
    out: Path, unit: str, rows: Sequence[Mapping[str, Any]], **summary: Any
) -> dict[str, Any]:
    """Records a finished unit; call it when all its outputs are in place.

    Args:
        out: The job's folder.
        unit: Name of the unit, a plain file name; records are joined in the order of the names.
        rows: One per input, with `state`, and with `reason` if it was left out.
        summary: Further values to keep at the head of the record.

    Returns:
        The head of the record: `written`, `skipped`, and `summary`.
    """
    num_skipped = sum(row["state"] == SKIPPED for row in rows)
    head = {"written": len(rows) - num_skipped, "skipped": num_skipped, **summary}
    lines = [encode_row(row) for row in (head, *rows)]
    write_text(_records_folder(out) / f"{unit}.jsonl", b"".join(lines).decode())
    return head


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of JSON; halves of surrogate pairs, which bad rows may hold, stay escaped."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def _records_folder(out: Path) -> Path:
    return out / _JOB / "records"
