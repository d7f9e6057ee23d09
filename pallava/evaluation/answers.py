"""Stores answers during a run, so that no question is asked twice.

Each process appends to its own file. A line holds the id of a question, a digest of everything that
the answer depends on, and the answer. Lines truncated by a kill are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from pallava.evaluation.models import NoAnswer
from pallava.records.containers import ID_FIELDS, read_records
from pathcore.files import StrPath, folder_lock
from pathcore.rows import BadRow, is_encodable, read_lines

_PATTERN = "rank*.jsonl"


class AnswerLog:
    """Append-only answers of one process; reads those of all processes.

    Args:
        folder: Folder of the files of all processes.
        rank: Rank of this process.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with AnswerLog(folder, rank=0) as log:
        ...     log.append({"q1": ("0af3", "yes")})
        >>> AnswerLog(folder, rank=0).read({"q1": "0af3", "q2": "77b1"})
        ({'q1': 'yes'}, {})
    """

    def __init__(self, folder: StrPath, rank: int) -> None:
        self.folder = Path(folder)
        self.path = self.folder / f"rank{rank:03d}.jsonl"
        self._descriptor: int | None = None
        self._stack = ExitStack()

    def __enter__(self) -> AnswerLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two runs in one folder would both answer, and pay for, the same questions.
        self._stack.enter_context(folder_lock(self.path, folder=self.folder.parent))
        cut_off = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if cut_off and self.path.stat().st_size:
            os.write(self._descriptor, b"\n")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._stack.close()

    def append(self, answers: Mapping[str, tuple[str, str | NoAnswer]]) -> None:
        """Appends answers and refusals, given as `id -> (digest, answer)`, and fsyncs the file."""
        assert self._descriptor is not None, "AnswerLog is used as a context manager"
        lines = []
        for question_id, (digest, answer) in answers.items():
            row = {"question_id": question_id, "digest": digest}
            if isinstance(answer, NoAnswer):
                row |= {"answer": "", "refusal": answer.reason}
            else:
                row["answer"] = answer
            lines.append(json.dumps(row))
        content = memoryview(("\n".join(lines) + "\n").encode())
        while content:
            content = content[os.write(self._descriptor, content) :]
        os.fsync(self._descriptor)

    def read(self, digests: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """Returns matching answers and refusals by question id, from the files of all processes.

        The answer of a refusal is empty.

        Args:
            digests: Expected digest by question id. Answers with another digest belong to a
                different model or prompt and are ignored.
        """
        answers: dict[str, str] = {}
        refusals: dict[str, str] = {}
        for path in sorted(self.folder.glob(_PATTERN)):
            for _, record in read_lines(path):
                try:
                    question_id, digest = record["question_id"], record["digest"]
                    if digests.get(question_id) == digest:
                        answers[question_id] = record["answer"]
                        if "refusal" in record:
                            refusals[question_id] = record["refusal"]
                except (KeyError, TypeError):  # truncated by a kill
                    continue
        return answers, refusals


def read_answers(path: StrPath) -> tuple[dict[str, str], int]:
    """Reads finished answers: a JSON list or JSON lines of `{question_id, answer}`, or an object.

    Returns:
        Answers by question id, and how many of them had no id and were numbered by position.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another format; the message names the record.
    """
    answers: dict[str, str] = {}
    num_positions = 0
    is_list = Path(path).suffix == ".jsonl" or Path(path).read_bytes()[:64].lstrip()[:1] == b"["
    for question_id, record in read_records(path):
        if isinstance(record, BadRow):
            raise ValueError(f"{path}, {question_id!r}: {record}")
        answer = record.get("answer") if isinstance(record, Mapping) else record
        if not isinstance(answer, str):
            raise ValueError(
                f"{path}, {question_id!r}: expected {{question_id, answer}} with text, found "
                f"{record!r:.80}"
            )
        if not is_encodable(answer):
            raise ValueError(
                f"{path}, {question_id!r}: the answer holds half a surrogate pair, which no file "
                "can store; write it again without"
            )
        if question_id in answers:
            raise ValueError(f"{path}: two answers to {question_id!r}")
        answers[question_id] = answer
        num_positions += (
            is_list
            and isinstance(record, Mapping)
            and not any(field in record for field in ID_FIELDS)
        )
    return answers, num_positions
