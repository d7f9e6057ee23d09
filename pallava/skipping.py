"""Log of samples that a run skipped, with reasons."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pathcore.files import StrPath
from pathcore.rows import encode_row, read_lines

SKIP_LOG_NAME = "skipped_samples.jsonl"


@dataclass(frozen=True)
class SkippedSample:
    """One sample that could not be used.

    Attributes:
        id: Id of the sample in the data file.
        file: File that caused the problem.
        reason: Description of the problem.
    """

    id: str
    file: str
    reason: str


class SkipLog:
    """JSON lines file to which several processes can write concurrently.

    Every record is a single line, written by one call on a file opened for appending, so that lines
    of data loader workers and ranks never interleave. The file is created with the first record.
    Instances hold no open file and can be pickled to worker processes.

    Example:
        >>> import tempfile
        >>> log = SkipLog(Path(tempfile.mkdtemp()) / "skipped_samples.jsonl")
        >>> log.record("slide_7", "images/7.png", "truncated")
        >>> [sample.id for sample in log.read()]
        ['slide_7']
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._seen: set[tuple[str, str]] = set()

    def record(self, sample_id: object, file: StrPath, reason: object) -> None:
        """Appends one line; each process writes the same id and file only once.

        Args:
            sample_id: Id of the sample in the data file.
            file: File that caused the problem.
            reason: Description of the problem, usually the exception.
        """
        sample = SkippedSample(str(sample_id), os.fspath(file), str(reason))
        if (sample.id, sample.file) in self._seen:
            return
        self._seen.add((sample.id, sample.file))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, encode_row(asdict(sample)))
        finally:
            os.close(descriptor)

    def read(self) -> list[SkippedSample]:
        """Returns the skipped samples in order of their first record, each id and file once.

        Raises:
            ValueError: If the file contains a line that is not a record.
        """
        if not self.path.is_file():
            return []
        samples: dict[tuple[str, str], SkippedSample] = {}
        for number, row in read_lines(self.path):
            try:
                sample = SkippedSample(**row)
            except TypeError as error:
                raise ValueError(
                    f"{self.path}, line {number}: expected id, file and reason, found {row!r:.80}"
                ) from error
            samples.setdefault((sample.id, sample.file), sample)
        return list(samples.values())
