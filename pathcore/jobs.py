"""Resumable jobs: a folder that contains the output of a long job and its state.

`OUT/.job/` holds the settings of the job, its lock, and one record per finished unit of work (a
slide, a shard). A record is written after the output that it describes, so that a killed job
continues with the units that have no record. `finish` joins the records to `OUT/manifest.jsonl`,
with one row per input, copies the rows of skipped inputs to `OUT/skipped.jsonl` and writes the
counts to `OUT/report.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pathcore.exit_codes import EXIT_OK, EXIT_SKIPPED
from pathcore.files import (
    OutputExistsError,
    StrPath,
    atomic_file,
    check_name,
    folder_lock,
    remove_partials,
    write_json,
    write_text,
)
from pathcore.pool import PoolOptions, ProgressBar, WorkerDiedError, run_tasks
from pathcore.rows import encode_row

if TYPE_CHECKING:
    from typing_extensions import Unpack

WRITTEN, SKIPPED = "written", "skipped"
MANIFEST_NAME, SKIPPED_NAME, REPORT_NAME = "manifest.jsonl", "skipped.jsonl", "report.json"
PASSED_OVER_NAME = "passed_over.jsonl"
WORKER_DIED = "worker died"

_JOB, _LOCK, _RECORD_SUFFIX = ".job", "lock", ".jsonl"
_SUMMARIES = (MANIFEST_NAME, SKIPPED_NAME, REPORT_NAME, PASSED_OVER_NAME)

Task = TypeVar("Task")


class UnitError(ValueError):
    """Raised if an input cannot be processed; the job records it as skipped and continues.

    Attributes:
        reason: Category of the fault, in a few words.
    """

    reason: ClassVar[str] = "cannot be processed"


@dataclass
class Report:
    """Outcome of a job.

    Attributes:
        written: Number of inputs whose output was written.
        skipped: Number of inputs without output; `skipped.jsonl` lists them.
        reasons: Number of skipped inputs by reason.
        notes: Further counts, for example of patches that extend beyond the edge of their slide.
        incomplete: Number of written inputs of which a part was skipped, by reason.
        passed_over: Number of files that were found but are not inputs, by reason;
            `passed_over.jsonl` lists them.
    """

    written: int = 0
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    incomplete: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """`EXIT_SKIPPED` if an input or a part of one was skipped, else `EXIT_OK`."""
        return EXIT_SKIPPED if self.skipped or self.incomplete else EXIT_OK


class JobFolder:
    """Context manager that holds the lock of a job's output folder.

    Args:
        out: Output folder; created if needed.
        inputs: Settings that determine the output, as JSON values. A folder that was begun with
            other settings is refused.
        retry_skipped: Whether to repeat the units in which an input was skipped.

    Raises:
        OutputExistsError: If the folder contains something else.
        FolderInUseError: If another process holds the lock.

    Example:
        >>> import tempfile
        >>> with JobFolder(Path(tempfile.mkdtemp()) / "out", {"operation": "example"}) as job:
        ...     _ = write_record(job.out, "slide_1", [{"slide": "slide_1", "state": WRITTEN}])
        ...     sorted(job.done()), job.finish().written
        (['slide_1'], 1)
    """

    def __init__(
        self, out: StrPath, inputs: Mapping[str, Any], *, retry_skipped: bool = False
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out / _JOB
        self.inputs = json.loads(json.dumps(inputs))
        self.retry_skipped = retry_skipped
        self._stack = ExitStack()

    def __enter__(self) -> JobFolder:
        if self.out.exists() and not self.out.is_dir():
            raise OutputExistsError(f"{self.out}: is a file; name a folder")
        if not self.folder.is_dir() and self.out.is_dir() and any(self.out.iterdir()):
            raise OutputExistsError(
                f"{self.out}: already exists and was not written by this command; name a new folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._stack.enter_context(folder_lock(self.folder / _LOCK, folder=self.out))
            self._check_inputs()
            shutil.rmtree(staging_folder(self.out), ignore_errors=True)
            remove_partials(self.out)
            staging_folder(self.out).mkdir(exist_ok=True)
            _records_folder(self.out).mkdir(exist_ok=True)
            if self.retry_skipped:
                for name, head in self.done().items():
                    if head["skipped"] or head.get("incomplete"):
                        self.forget(name)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def done(self) -> dict[str, dict[str, Any]]:
        """Returns the head of each finished unit's record, by name of the unit."""
        heads = {}
        for path in sorted(_records_folder(self.out).glob(f"*{_RECORD_SUFFIX}")):
            with path.open("rb") as file:
                heads[path.stem] = json.loads(file.readline())
        return heads

    def forget(self, unit: str) -> None:
        """Removes the record of a unit, so that the unit is processed again."""
        (_records_folder(self.out) / f"{unit}{_RECORD_SUFFIX}").unlink(missing_ok=True)

    def run(
        self,
        function: Callable[[Task], Mapping[str, Any]],
        tasks: Iterable[Task],
        *,
        on_death: Callable[[Task, WorkerDiedError], Iterable[Task]],
        num_inputs: int,
        noun: str,
        progress: bool = True,
        **pool: Unpack[PoolOptions],
    ) -> None:
        """Processes units of work with a progress bar.

        Args:
            function: Function that processes a unit and returns the result of `write_record`.
            tasks: Tasks of the units that have no record yet.
            on_death: Function that is called if a unit kills its worker; it records the unit as
                skipped, or returns tasks to run instead. See `run_tasks`.
            num_inputs: Number of inputs of all units.
            noun: Name of an input, for the progress bar.
            progress: Whether to show the progress bar.
            **pool: See `PoolOptions`.
        """
        num_done = sum(head["written"] + head["skipped"] for head in self.done().values())
        results = run_tasks(function, tasks, on_death=on_death, **pool)
        with ProgressBar(
            total=num_inputs, initial=num_done, unit=noun, disable=not progress
        ) as bar:
            for head in results:
                bar.update(head["written"] + head["skipped"])

    def finish(
        self,
        extra_rows: Iterable[Mapping[str, Any]] = (),
        passed_over: Iterable[Mapping[str, Any]] = (),
    ) -> Report:
        """Joins the records of all units and writes manifest, list of skipped inputs and report.

        Args:
            extra_rows: Rows of inputs that belong to no unit. A row with a `count` counts as that
                many inputs.
            passed_over: Rows of files that were found but are not inputs, with their `reason`.
        """
        report, reasons, notes = Report(), Counter[str](), Counter[str]()
        incomplete, ignored = Counter[str](), Counter[str]()
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
                    reasons[row["reason"]] += row.get("count", 1)
                else:
                    report.written += 1
                notes.update(row.get("notes", ()))
                incomplete.update(row.get("incomplete", ()))
        (self.out / PASSED_OVER_NAME).unlink(missing_ok=True)
        lines = []
        for row in passed_over:
            lines.append(encode_row(row))
            ignored[row["reason"]] += 1
        if lines:
            write_text(self.out / PASSED_OVER_NAME, b"".join(lines).decode())
        report.skipped, report.reasons = sum(reasons.values()), dict(reasons.most_common())
        report.notes = dict(sorted(notes.items()))
        report.incomplete = dict(sorted(incomplete.items()))
        report.passed_over = dict(ignored.most_common())
        write_json(self.out / REPORT_NAME, asdict(report))
        shutil.rmtree(staging_folder(self.out), ignore_errors=True)
        return report

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of all records, sorted by name of the unit."""
        yield from (json.loads(line) for line in self._lines())

    def _lines(self) -> Iterator[bytes]:
        for path in sorted(_records_folder(self.out).glob(f"*{_RECORD_SUFFIX}")):
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
        # A run that wrote nothing must not bind the folder to its settings: if every input was
        # skipped because a setting was missing, the next run supplies it.
        if self._is_untouched():
            shutil.rmtree(_records_folder(self.out), ignore_errors=True)
            for name in _SUMMARIES:
                (self.out / name).unlink(missing_ok=True)
            for leftover in self.folder.iterdir():
                if leftover.is_file() and leftover.name != _LOCK:
                    leftover.unlink()
            write_json(path, self.inputs)
            return
        then, now = dict(_fields(found)), dict(_fields(self.inputs))
        changed = [n for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
        listed = ", ".join(f"{n}: {then.get(n)!r} then, {now.get(n)!r} now" for n in changed)
        raise OutputExistsError(
            f"{self.out}: was begun with other settings ({listed}); "
            "name a new folder, or use the settings it was begun with"
        )

    def _is_untouched(self) -> bool:
        """Returns whether the folder contains neither output nor a record of any."""
        ours = {_JOB, *_SUMMARIES}
        others = (child for child in self.out.iterdir() if child.name not in ours)
        output = (path for child in others for path in (child, *child.rglob("*")))
        return not any(path.is_file() for path in output) and not any(
            head["written"] for head in self.done().values()
        )


def _fields(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings, those of a group as `group.name`, so that only differences are shown."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_job_output(folder: Path) -> bool:
    """Returns whether a folder is the output of a job."""
    return (folder / _JOB / "job.json").is_file()


def staging_folder(out: Path) -> Path:
    """Returns the folder for output that is not complete yet."""
    return out / _JOB / "staging"


def write_record(out: Path, unit: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Records a finished unit; must be called after all its output has been written.

    Args:
        out: The folder of the job.
        unit: Name of the unit, a plain file name. Records are joined in the order of these names.
        rows: One row per input, with `state`, and with `reason` if the input was skipped. If a part
            of a written input was skipped, `incomplete` lists the reasons.

    Returns:
        The head of the record: the numbers of `written`, `skipped` and `incomplete` inputs.

    Raises:
        UnsafeNameError: If `unit` is no plain file name.
    """
    check_name(unit, room_bytes=len(_RECORD_SUFFIX))
    num_skipped = sum(row["state"] == SKIPPED for row in rows)
    head = {
        "written": len(rows) - num_skipped,
        "skipped": num_skipped,
        "incomplete": sum(bool(row.get("incomplete")) for row in rows),
    }
    lines = [encode_row(row) for row in (head, *rows)]
    write_text(_records_folder(out) / f"{unit}{_RECORD_SUFFIX}", b"".join(lines).decode())
    return head


def _records_folder(out: Path) -> Path:
    return out / _JOB / "records"
