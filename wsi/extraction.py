"""Millions of patches from thousands of slides: sorted, in parallel, resumable.

Requests are sorted by slide and position into a table on disk and cut into parts of a fixed size.
A part is written by one worker and recorded when it is in place, so that the same requests give
the same bytes from any number of workers, and a killed job continues where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pathcore.files import atomic_file
from wsi.engines import Engine, ProgressBar, run_tasks
from wsi.extraction_part import OutputSettings, Part, pair_lines, write_part
from wsi.manifest import SKIPPED, JobFolder, Report
from wsi.request_table import PatchRequest, RejectedRow, RequestTable
from wsi.slide_listing import SlideListing

PAIRS_NAME = "pairs.jsonl"

_TABLE_NAME = "requests.sqlite"


def extract(
    rows: Callable[[], Iterable[PatchRequest | RejectedRow]],
    slides: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: OutputSettings,
    source: Mapping[str, Any],
    mpp: float | None = None,
    workers: int = 1,
    engine: Engine = "process",
    address: str | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
) -> Report:
    """Extracts patches, and their captions where there are any.

    Args:
        rows: Gives the requests in the order of their source, and the rows that are none.
        slides: Folder of the slides.
        out: Folder to write; a job that was stopped continues in it.
        settings: Layout, image format and size of the parts.
        source: What identifies the requests, a digest for instance: a folder begun with others is
            refused.
        mpp: Micrometres per pixel of all slides, in place of what they say.
        workers: Patches are read by so many processes.
        engine: `process` or `ray`.
        address: Of a Ray cluster; all its machines must see `slides` and `out`.
        retry_skipped: Try again what an earlier run left out.
        progress: Show rate and time left.

    Returns:
        What was written and what was left out; `out` has it row by row in `manifest.jsonl`.

    Raises:
        OutputExistsError: `out` holds something else.
        FolderInUseError: Another run is writing to `out`.
        OSError: The disk is full, for instance; run again to continue.
    """
    listing = SlideListing(slides)
    inputs = {"operation": "extract", "source": dict(source), **asdict(settings), "mpp": mpp}
    with JobFolder(out, inputs, retry_skipped=retry_skipped) as job:
        table_path = job.folder / _TABLE_NAME
        if not table_path.is_file():
            RequestTable.build(table_path, rows())
        with RequestTable(table_path) as table:
            done = job.done()
            num_done = sum(head["written"] + head["skipped"] for head in done.values())
            parts = _parts(job, table, listing, settings, mpp, done)
            with ProgressBar(
                total=len(table), initial=num_done, unit="patch", disable=not progress
            ) as bar:
                for head in run_tasks(
                    write_part, parts, workers=workers, engine=engine, address=address
                ):
                    bar.update(head["written"] + head["skipped"])
            report = job.finish(_rejected_rows(table))
        if settings.layout == "files":
            _write_pairs(job)
        return report


def _parts(
    job: JobFolder,
    table: RequestTable,
    listing: SlideListing,
    settings: OutputSettings,
    mpp: float | None,
    done: Mapping[str, Any],
) -> Iterator[Part]:
    for number in range(-(-len(table) // settings.part_size)):
        part = Part(number, (), {}, job.out, settings, mpp)
        if part.name not in done:
            requests = table.part(number, settings.part_size)
            slides = listing.find({request.slide_id for request in requests})
            yield Part(number, requests, slides, job.out, settings, mpp)


def _rejected_rows(table: RequestTable) -> Iterator[dict[str, Any]]:
    for row in table.rejected():
        yield {
            "row": row.number,
            "state": SKIPPED,
            "reason": row.reason,
            "detail": row.detail,
        }


def _write_pairs(job: JobFolder) -> None:
    with atomic_file(job.out / PAIRS_NAME) as partial, partial.open("wb") as file:
        file.writelines(pair_lines(job.rows(), job.out))
