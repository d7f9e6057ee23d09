"""Extracts patches from many slides, as a parallel, resumable job.

Requests are sorted by slide and position into a table on disk and divided into parts of a fixed
size. A worker writes the files of a part and then its record. The content of a part depends only on
its requests, so that any number of workers writes the same bytes, and a job that was killed
continues where it stopped.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from pathcore.files import StrPath, atomic_file, fsync_path, sha256_of
from pathcore.jobs import (
    SKIPPED,
    WORKER_DIED,
    WRITTEN,
    JobFolder,
    Report,
    staging_folder,
    write_record,
)
from pathcore.pool import PoolOptions, WorkerDiedError
from pathcore.rows import encode_row
from wsi.image_codecs import encoder
from wsi.reader import Region, Slide, SlideError
from wsi.requests import PatchRequest, RejectedRow, RequestTable, read_coordinate_folder
from wsi.slide_listing import AmbiguousSlideError, SlideListing, SlideNotFoundError
from wsi.store import OtherSlideError, check_slide_px

if TYPE_CHECKING:
    from typing_extensions import Unpack

Layout = Literal["files", "shards"]

PAIRS_NAME = "pairs.jsonl"
SHARDS_FOLDER = "shards"

_TABLE_NAME = "requests.sqlite"


@dataclass(frozen=True)
class OutputSettings:
    """Format of the extracted patches.

    Attributes:
        layout: `files` for an image and a text file per patch, with PathGen's names, all in one
            folder; `shards` for WebDataset tar files.
        image_format: `png`, `jpg` or `webp`.
        quality: Quality from 1 to 100; by default that of the format.
        part_size: Number of patches per part, which is a shard with `shards`.
    """

    layout: Layout = "files"
    image_format: str = "png"
    quality: int | None = None
    part_size: int = 1000

    def __post_init__(self) -> None:
        if self.layout not in ("files", "shards"):
            raise ValueError(f"layout {self.layout!r}: expected files or shards")
        if self.part_size < 1:
            raise ValueError(f"part_size: expected at least 1, found {self.part_size}")
        encoder(self.image_format, self.quality)


@dataclass(frozen=True)
class Part:
    """Patches that a worker reads, encodes and writes as a unit.

    Attributes:
        number: Number of the part, counted from 0.
        requests: Requests, sorted by slide and position.
        slides: File of each slide that exists.
        out: The folder of the job.
        settings: Format of the output.
        mpp: Micrometres per pixel by slide, overriding the files.
        deadly: Reason and detail for each slide that killed a worker; these slides are skipped.
    """

    number: int
    requests: Sequence[PatchRequest]
    slides: Mapping[str, Path]
    out: Path
    settings: OutputSettings
    mpp: Mapping[str, float] = field(default_factory=dict)
    deadly: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the part's record and shard."""
        return part_name(self.number)

    @property
    def slide_note(self) -> Path:
        """File in which a worker notes the slide it is working on, in case the slide kills it."""
        return staging_folder(self.out) / f"{self.name}.slide"


def part_name(number: int) -> str:
    """Returns the name of a part's record and shard, such as `000042`."""
    return f"{number:06d}"


def extract(
    requests: StrPath | Callable[[], Iterable[PatchRequest | RejectedRow]],
    slides: StrPath,
    out: StrPath,
    *,
    settings: OutputSettings | None = None,
    source: Mapping[str, Any] | None = None,
    mpp: float | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
    **pool: Unpack[PoolOptions],
) -> Report:
    """Extracts patches, with captions if the requests have them.

    Args:
        requests: Folder of coordinate files, or a function that returns the requests and rejected
            rows in the order of their source. It is called again if slides are added later.
        slides: Folder or table of the slides; see `SlideListing`.
        out: Output folder; a job that was stopped continues in it.
        settings: Layout, image format and size of the parts.
        source: Identifies the requests, for instance by a digest; a folder that was begun with
            other requests is refused. Defaults to the digest of the folder of coordinate files.
        mpp: Micrometres per pixel of all slides, overriding the files.
        retry_skipped: Whether to retry patches that an earlier run skipped.
        progress: Whether to show a progress bar.
        **pool: See `pathcore.pool.PoolOptions`; a task is a part of the patches.

    Returns:
        The report. `manifest.jsonl` in `out` has a row per patch, and one per missing slide.

    Raises:
        FileNotFoundError: If the folder of coordinate files does not exist.
        ValueError: If `requests` is a function and `source` is missing.
        OutputExistsError: If `out` contains something else.
        FolderInUseError: If another run is writing to `out`.
        OSError: If the output cannot be written; run again to continue.
    """
    if callable(requests):
        rows = requests
        if source is None:
            raise ValueError("source: needed with a function, to identify what it returns")
    else:
        folder = requests
        rows = lambda: read_coordinate_folder(folder)  # noqa: E731
        source = source or {"sha256": sha256_of(folder), "patch_px": None}
    settings = settings or OutputSettings()
    listing = SlideListing(slides, exclude=[out])
    inputs = {"operation": "extract", "source": dict(source), **asdict(settings), "mpp": mpp}
    with JobFolder(out, inputs, retry_skipped=retry_skipped) as job:
        table_path = job.folder / _TABLE_NAME
        if not table_path.is_file():
            RequestTable.build(table_path, rows(), lambda name: _why_missing(listing, name))
        elif retry_skipped:
            _add_slides(job, listing, settings.part_size, rows)
        with RequestTable(table_path) as table:
            job.run(
                write_part,
                _parts(job, table, listing, settings, mpp),
                on_death=_without_deadly_slide,
                num_inputs=len(table),
                noun="patch",
                progress=progress,
                **pool,
            )
            passed_over = (found.row() for found in listing.passed_over)
            report = job.finish(_rows_without_part(table), passed_over)
        if settings.layout == "files":
            with atomic_file(job.out / PAIRS_NAME) as partial, partial.open("wb") as file:
                file.writelines(_pair_lines(job.rows(), job.out))
        return report


def _why_missing(listing: SlideListing, slide_id: str) -> tuple[str, str] | None:
    try:
        listing.find(slide_id)
    except (SlideNotFoundError, AmbiguousSlideError) as error:
        return SlideNotFoundError.reason, str(error)
    return None


def _add_slides(
    job: JobFolder,
    listing: SlideListing,
    part_size: int,
    rows: Callable[[], Iterable[PatchRequest | RejectedRow]],
) -> None:
    """Adds slides that were missing in an earlier run and exist now."""
    with RequestTable(job.folder / _TABLE_NAME) as table:
        names = [slide.slide_id for slide in table.missing()]
        added = [name for name in names if _why_missing(listing, name) is None]
        if not added:
            return
        # Records are removed before the table changes: if the run is killed in between, the parts
        # are merely written again. The other way round they would miss the new patches.
        for number in table.parts_of(added, part_size):
            job.forget(part_name(number))
        table.add_slides(added, rows())


def _parts(
    job: JobFolder,
    table: RequestTable,
    listing: SlideListing,
    settings: OutputSettings,
    mpp: float | None,
) -> Iterator[Part]:
    done = job.done()
    for number in table.parts_with_requests(settings.part_size):
        if part_name(number) not in done:
            requests = table.part(number, settings.part_size)
            names = {request.slide_id for request in requests}
            slides = {
                name: listing.find(name) for name in names if _why_missing(listing, name) is None
            }
            own = {name: found for name in slides if (found := listing.mpp.get(name, mpp))}
            yield Part(number, requests, slides, job.out, settings, own)


def _without_deadly_slide(part: Part, error: WorkerDiedError) -> list[Part]:
    """Returns the part without the slide that killed its worker."""
    try:
        slide_id = part.slide_note.read_text(encoding="utf-8")
    except OSError:
        slide_id = ""
    if slide_id not in part.slides or slide_id in part.deadly:
        raise error  # no slide is to blame, so a retry would end the same way
    fault = WORKER_DIED, f"{part.slides[slide_id]}: {error}"
    return [replace(part, deadly={**part.deadly, slide_id: fault})]


def _rows_without_part(table: RequestTable) -> Iterator[dict[str, Any]]:
    for row in table.rejected():
        yield {"row": row.number, "state": SKIPPED, "reason": row.reason, "detail": row.detail}
    for slide in table.missing():
        yield {
            "wsi_id": slide.slide_id,
            "state": SKIPPED,
            "reason": slide.reason,
            "detail": slide.detail,
            "count": len(slide.rows),
            "rows": slide.rows,
        }


def write_part(part: Part) -> dict[str, Any]:
    """Extracts the patches of a part and writes its record.

    Returns:
        The head of the record, with the numbers of written and skipped patches.

    Raises:
        OSError: If the output cannot be written.
    """
    encode = encoder(part.settings.image_format, part.settings.quality)
    sink_type = ShardSink if part.settings.layout == "shards" else FileSink
    rows: list[dict[str, Any]] = []
    deadly: dict[str, tuple[str, str]] = {}
    with sink_type(part) as sink:
        for slide_id, group in groupby(part.requests, key=lambda request: request.slide_id):
            requests = list(group)
            path = part.slides.get(slide_id)
            if path is None:  # removed since the table was built
                reason = SlideNotFoundError.reason, f"no slide named {slide_id!r} any more"
            elif slide_id in part.deadly:
                reason = part.deadly[slide_id]
            else:
                part.slide_note.write_text(slide_id, encoding="utf-8")
                try:
                    rows += _extract_slide(part, path, requests, encode, sink)
                    continue
                except SlideError as error:
                    reason = error.reason, str(error)
                except (OSError, RuntimeError):
                    raise  # for instance a full disk, which affects every slide
                except Exception as error:  # any other fault is blamed on the slide
                    what = "out of memory" if isinstance(error, MemoryError) else "unexpected error"
                    deadly[slide_id] = what, f"{path}: {type(error).__name__}: {error}"
                    break
            rows += [_skipped(request, *reason) for request in requests]
        else:
            sink.finish()
    part.slide_note.unlink(missing_ok=True)
    if deadly:  # the sink may hold patches of this slide, so the part is started over without it
        return write_part(replace(part, deadly={**part.deadly, **deadly}))
    return write_record(part.out, part.name, rows)


def _extract_slide(
    part: Part,
    path: Path,
    requests: list[PatchRequest],
    encode: Callable[[NDArray[np.uint8]], bytes],
    sink: FileSink | ShardSink,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Slide(path, mpp=part.mpp.get(requests[0].slide_id)) as slide:
        own = []
        for request in requests:
            try:
                check_slide_px(slide, request.slide_px, f"coordinates of {request.slide_id}")
                own.append(request)
            except OtherSlideError as error:
                rows.append(_skipped(request, error.reason, str(error)))
        requests = own
        regions = [Region(r.x_level0, r.y_level0, r.size_level0, r.size_px) for r in requests]
        places = [slide.overlap(region) for region in regions]
        wanted = [
            region for region, place in zip(regions, places, strict=True) if place != "outside"
        ]
        pixels = slide.read_many(wanted)
        for request, place in zip(requests, places, strict=True):
            if place == "outside":
                width, height = slide.dimensions
                detail = (
                    f"position ({request.x_level0}, {request.y_level0}); the slide has "
                    f"{width} x {height} pixels"
                )
                rows.append(_skipped(request, "outside the slide", detail))
                continue
            image = next(pixels)
            if isinstance(image, SlideError):
                rows.append(_skipped(request, "damaged region", str(image)))
                continue
            row = sink.add(request, encode(image), slide.known_mpp)
            if place == "partial":
                row["notes"] = ["over the edge"]
            rows.append(row)
    return rows


class FileSink:
    """Writes an image file and a text file per patch, with the names of PathGen's script.

    Files are written to a staging folder and moved to the output folder when the part is complete.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._names: list[str] = []

    def __enter__(self) -> FileSink:
        prefix = f"{self._part.name}-"
        self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=staging_folder(self._part.out)))
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, request: PatchRequest, image: bytes, mpp: float | None) -> dict[str, Any]:
        """Adds a patch and returns its row of the manifest."""
        stem = patch_stem(request)
        name = f"{stem}.{self._part.settings.image_format}"
        self._write(name, image)
        if request.caption is not None:
            self._write(f"{stem}.txt", request.caption.encode())
        return _written(request, name, image, mpp)

    def finish(self) -> None:
        """Moves all files to the output folder."""
        for name in self._names:
            fsync_path(self._folder / name)
        for name in self._names:
            os.replace(self._folder / name, self._part.out / name)
        fsync_path(self._part.out)

    def _write(self, name: str, content: bytes) -> None:
        with open(self._folder / name, "wb", buffering=0) as file:
            _write_all(file, content)
        self._names.append(name)


class ShardSink:
    """Writes a WebDataset shard: image, text and JSON of a patch share a key.

    Keys are numbers, because WebDataset splits names at the first dot and slide ids contain dots.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._num_samples = 0

    def __enter__(self) -> ShardSink:
        folder = staging_folder(self._part.out)
        descriptor, path = tempfile.mkstemp(prefix=f"{self._part.name}-", dir=folder)
        self._path = Path(path)
        self._file = os.fdopen(descriptor, "wb", buffering=1 << 20)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)

    def add(self, request: PatchRequest, image: bytes, mpp: float | None) -> dict[str, Any]:
        """Adds a patch and returns its row of the manifest."""
        key = f"{self._part.name}{self._num_samples:06d}"
        self._num_samples += 1
        image_format = self._part.settings.image_format
        row = _written(request, f"{SHARDS_FOLDER}/{self._part.name}.tar", image, mpp)
        row["key"] = key
        described = {name: row[name] for name in ("id", "wsi_id", "position", "size_level0", "mpp")}
        self._write(f"{key}.{image_format}", image)
        if request.caption is not None:
            self._write(f"{key}.txt", request.caption.encode())
        self._write(f"{key}.json", json.dumps(described, ensure_ascii=False).encode())
        return row

    def finish(self) -> None:
        """Moves the shard to the output folder; a part without patches has no shard."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        shard = self._part.out / SHARDS_FOLDER / f"{self._part.name}.tar"
        if not self._num_samples:
            shard.unlink(missing_ok=True)
            return
        shard.parent.mkdir(exist_ok=True)
        os.chmod(self._path, 0o644)
        os.replace(self._path, shard)
        fsync_path(shard.parent)

    def _write(self, name: str, content: bytes) -> None:
        # Time, owner and mode keep TarInfo's defaults, so that equal patches give equal shards.
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))


def patch_stem(request: PatchRequest) -> str:
    """Returns the file name of a patch without suffix, as PathGen's script forms it."""
    return f"{request.slide_id}_{request.x_level0}_{request.y_level0}"


def _pair_lines(rows: Iterator[dict[str, Any]], out: Path) -> Iterator[bytes]:
    """Yields the lines of `pairs.jsonl`, one per patch with a caption file."""
    for row in rows:
        caption = (out / row["file"]).with_suffix(".txt") if row["state"] == WRITTEN else None
        if caption and caption.is_file():
            pair = {"id": row["id"], "image": row["file"], "caption": caption.read_bytes().decode()}
            yield encode_row(pair | {name: row[name] for name in ("wsi_id", "position", "mpp")})


def _written(request: PatchRequest, file: str, image: bytes, mpp: float | None) -> dict[str, Any]:
    scale = request.size_level0 / request.size_px
    return {
        **_described(request),
        "state": WRITTEN,
        "file": file,
        "bytes": len(image),
        "crc32": isal_zlib.crc32(image),
        "size_level0": request.size_level0,
        "mpp": None if mpp is None else round(mpp * scale, 6),
    }


def _skipped(request: PatchRequest, reason: str, detail: str) -> dict[str, Any]:
    return {**_described(request), "state": SKIPPED, "reason": reason, "detail": detail}


def _described(request: PatchRequest) -> dict[str, Any]:
    return {
        "id": patch_stem(request),
        "row": request.number,
        "wsi_id": request.slide_id,
        "position": [request.x_level0, request.y_level0],
    }


def _write_all(file: Any, content: bytes) -> None:
    # An unbuffered file may write only part of its input and returns how much.
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
