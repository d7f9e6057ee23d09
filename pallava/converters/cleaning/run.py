"""Cleaning job: runs rows through the steps and reports what was dropped and why."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pallava.converters.cleaning.report import write_page, write_tables
from pallava.converters.cleaning.steps import Candidate, RowIndex, Step, index_step
from pallava.converters.parts import Joined, Part, Shard, run_in_parts
from pallava.records.containers import read_json_rows
from pallava.skipping import SKIP_LOG_NAME
from pallava.text.encoding import check_row, image_files
from pathcore.files import StrPath, file_identity
from pathcore.images import ImageError, path_inside
from pathcore.rows import MAX_SKIPPED_FRACTION, check_fraction, pair_fault

REPORT_NAME = "cleaning.json"
TABLES_NAME = "cleaning.md"
PAGE_NAME = "cleaning.html"
DROPPED_NAME = "dropped.jsonl"
MISSING_NAME = "index_missing.txt"

_SHOWN_CHARACTERS = 600


def clean(
    rows_file: StrPath,
    out: StrPath,
    steps: Sequence[Step],
    *,
    image_folder: StrPath | None = None,
    index: frozenset[str] | None = None,
    num_samples: int = 10,
    max_skipped_fraction: float = MAX_SKIPPED_FRACTION,
    part_rows: int = 2048,
    shard: Shard | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any] | None:
    """Copies the rows that pass every step; resumes after an interruption.

    `out` receives the kept rows under the input's file name, `dropped.jsonl` with `step` and
    `reason`, `skipped_samples.jsonl` with unreadable rows, and the report as `cleaning.json`, `.md`
    and `.html`.

    Args:
        rows_file: Pairs or conversations, as `.jsonl` or a `.json` array.
        out: Output folder.
        steps: Cleaning steps in order; a step sees only rows that passed the previous ones.
        image_folder: Folder that image names are relative to. Defaults to the folder of the file.
        index: Names of the rows to keep, applied before all other steps.
        num_samples: Number of dropped rows that the report shows per step.
        max_skipped_fraction: Maximum fraction of unreadable rows; more raise an error.
        part_rows: Number of rows between two points from which a job can resume.
        shard: Shard to process; a final run without it joins the parts.
        progress: Called with the number of rows processed.

    Returns:
        The report; None for a shard.

    Raises:
        ValueError: If there are no rows or steps, too many rows are unreadable, or two steps share
            a name, or the kept rows would replace the input or take the name of another output.
        FileNotFoundError: If a file or folder does not exist.
        OutputExistsError: If `out` holds something else.
    """
    path = Path(rows_file)
    folder = Path(image_folder) if image_folder else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder}: no such folder")
    if index is not None:
        steps = [index_step(index), *steps]
    if not steps or len({step.name for step in steps}) < len(steps):
        raise ValueError("cleaning: expected at least one step, and no two with the same name")
    name = f"{path.stem}.jsonl"
    if name in (DROPPED_NAME, SKIP_LOG_NAME):
        raise ValueError(
            f"{path}: the rows that are kept would have the name of another output, {name}; copy "
            "the file to pairs.jsonl or conversations.jsonl"
        )
    if (Path(out) / name).resolve() == path.resolve():
        raise ValueError(f"{path}: would be replaced by the rows that are kept; name another OUT")

    def handle(batch: Sequence[tuple[str, Any]]) -> Part:
        return _clean_part(batch, steps, folder, str(path), name, num_samples)

    def report(joined: Joined, stage: Path) -> dict[str, Any]:
        content = _report(joined, steps, num_samples, str(path), max_skipped_fraction)
        if index is not None:
            content["index"] = _compare_index(index, stage, name)
        write_tables(stage / TABLES_NAME, content)
        write_page(stage / PAGE_NAME, content, folder)
        return content

    inputs = {
        "rows": file_identity(path) if path.is_file() else str(path),
        "image_folder": str(folder.absolute()),
        "steps": [{"name": step.name, "settings": dict(step.settings)} for step in steps],
        "num_samples": num_samples,
    }
    return run_in_parts(
        read_json_rows(path),
        handle,
        out,
        inputs=inputs,
        report_name=REPORT_NAME,
        names=(name, DROPPED_NAME, SKIP_LOG_NAME),
        report=report,
        part_rows=part_rows,
        shard=shard,
        progress=progress,
    )


def _clean_part(
    batch: Sequence[tuple[str, Any]],
    steps: Sequence[Step],
    folder: Path,
    source: str,
    name: str,
    num_samples: int,
) -> Part:
    left: list[Candidate] = []
    dropped: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    counts: Counter[str] = Counter(rows=len(batch))
    for where, row in batch:
        try:
            left.append(_candidate(row, folder, where))
        except ImageError as error:
            skipped.append({"id": _row_id(row, where), "file": source, "reason": str(error)})
    samples: dict[str, list[Any]] = {}
    for step in steps:
        counts[f"seen {step.name}"] += len(left)
        kept, gone = [], []
        for candidate, verdict in zip(left, step(left), strict=True):
            if verdict is None:
                kept.append(candidate)
            elif verdict.unusable:
                skipped.append(
                    {"id": str(candidate.row["id"]), "file": source, "reason": verdict.reason}
                )
                counts[f"unusable {step.name}"] += 1
            else:
                gone.append({**candidate.row, "step": step.name, "reason": verdict.reason})
        counts[f"dropped {step.name}"] += len(gone)
        samples[step.name] = _draw(gone, num_samples)
        dropped += gone
        left = kept
    counts.update(kept=len(left), skipped=len(skipped))
    rows: dict[str, list[Any]] = {
        name: [c.row for c in left],
        DROPPED_NAME: dropped,
        SKIP_LOG_NAME: skipped,
    }
    faults = [f"{row['id']}: {row['reason']}" for row in skipped[:3]]
    return Part(rows, counts, {"samples": samples, "faults": faults})


def _candidate(row: Any, folder: Path, where: str) -> Candidate:
    talks = isinstance(row, Mapping) and "conversations" in row
    if isinstance(row, Mapping) and "id" not in row:
        if isinstance(row.get("image"), str):
            row = {"id": str(PurePosixPath(row["image"]).with_suffix("")), **row}
        elif talks:  # about no image, or several
            row = {"id": where, **row}
    if fault := check_row(row) if talks else pair_fault(row):
        raise ImageError(fault)
    return Candidate(row, tuple(path_inside(folder, name) for name in image_files(row)))


def _row_id(row: Any, where: str) -> str:
    known = row.get("id") if isinstance(row, Mapping) else None
    text = str(known) if known is not None else f"row {where}"
    return text.encode("utf-8", errors="backslashreplace").decode()


def _draw(gone: Sequence[Mapping[str, Any]], count: int) -> list[list[Any]]:
    """Samples rows by a digest of their ids, so that the sample does not depend on the parts."""
    ranked = ((_rank(row), number) for number, row in enumerate(gone))
    return [[rank, _sample(gone[number])] for rank, number in heapq.nsmallest(count, ranked)]


def _rank(row: Mapping[str, Any]) -> str:
    return hashlib.blake2b(f"{row['id']}\n{row.get('image')}".encode(), digest_size=8).hexdigest()


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    text = Candidate(row, ()).text[:_SHOWN_CHARACTERS].encode(errors="replace").decode()
    return {"id": str(row["id"]), "images": image_files(row), "text": text, "reason": row["reason"]}


def _report(
    joined: Joined, steps: Sequence[Step], num_samples: int, what: str, max_skipped_fraction: float
) -> dict[str, Any]:
    counts = joined.counts
    if not counts["rows"]:
        raise ValueError(f"{what}: holds no rows")
    faults = [fault for notes in joined.notes for fault in notes["faults"]]
    numbered = {str(number): fault for number, fault in enumerate(faults)}
    check_fraction(
        counts["skipped"], counts["rows"], what, numbered, max_fraction=max_skipped_fraction
    )
    tables = []
    for step in steps:
        drawn = (sample for notes in joined.notes for sample in notes["samples"][step.name])
        best = heapq.nsmallest(num_samples, drawn, key=lambda sample: (sample[0], sample[1]["id"]))
        numbers = {key: counts[f"{key} {step.name}"] for key in ("seen", "dropped", "unusable")}
        tables.append({"name": step.name, **numbers, "samples": [shown for _, shown in best]})
    return {
        "rows_file": what,
        "num_rows": counts["rows"],
        "num_kept": counts["kept"],
        "num_skipped": counts["skipped"],
        "steps": tables,
    }


def _compare_index(index: frozenset[str], stage: Path, name: str) -> dict[str, int]:
    """Counts index entries that match no row, and lists them in a file."""
    missing, known, example = set(index), RowIndex(index), ""
    for row in _stored(stage / name):
        missing -= known.entries_of(row)
    for row in _stored(stage / DROPPED_NAME):
        if row["step"] != "index":
            missing -= known.entries_of(row)
        example = example or f"id {row.get('id')!r}, image {row.get('image')!r}"
    if len(missing) == len(index):
        raise ValueError(
            f"index: names none of the rows; it has {next(iter(sorted(index)))!r}, the first row "
            f"that it does not name {example}"
        )
    lines = "".join(f"{entry}\n" for entry in sorted(missing))
    (stage / MISSING_NAME).write_text(lines, encoding="utf-8")
    return {"num_entries": len(index), "num_missing": len(missing)}


def _stored(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)
