"""The record of samples that a run left out, and why."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

SKIP_LOG_NAME = "skipped_samples.jsonl"


@dataclass(frozen=True)
class SkippedSample:
    """One sample that could not be used.

    Attributes:
        id: The sample's id, as in the data file.
        file: The file that is at fault.
        reason: What is wrong with it.
    """

    id: str
    file: str
    reason: str


class SkipLog:
    """A JSON-lines file to which many processes may write at the same time.

    Every record is one line, written by one call on a file opened for appending, so that lines of
    data-loader workers and of several ranks never mix. The file appears with the first record. An
    instance holds no open file and travels to worker processes.

    Args:
        path: The JSON-lines file.

    Example:
        >>> import tempfile
        >>> log = SkipLog(Path(tempfile.mkdtemp()) / "skipped_samples.jsonl")
        >>> log.record("slide_7", "images/7.png", "truncated")
        >>> [sample.id for sample in log.read()]
        ['slide_7']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._seen: set[tuple[str, str]] = set()

    def record(self, sample_id: object, file: str | os.PathLike[str], reason: object) -> None:
        """Appends one line; the same id and file are written once by one process.

        Args:
            sample_id: The sample's id, as in the data file.
            file: The file that is at fault.
            reason: What is wrong with it, usually the exception.
        """
        sample = SkippedSample(str(sample_id), os.fspath(file), str(reason))
        if (sample.id, sample.file) in self._seen:
            return
        self._seen.add((sample.id, sample.file))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(sample), ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8", errors="backslashreplace"))
        finally:
            os.close(descriptor)

    def read(self) -> list[SkippedSample]:
        """Returns what was skipped, each id and file once, in the order of the first record.

        Raises:
            ValueError: The file holds a line that is no record.
        """
        if not self.path.is_file():
            return []
        samples: dict[tuple[str, str], SkippedSample] = {}
        with self.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    sample = SkippedSample(**json.loads(line))
                except (json.JSONDecodeError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}, line {number}: id, file and reason expected ({error})"
                    ) from error
                samples.setdefault((sample.id, sample.file), sample)
        return list(samples.values())
