"""One part of an extraction: some hundred patches, read, encoded and put in place together.

Runs in a worker process, here or on another machine. What it writes depends on its requests alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathcore.files import fsync_path
from wsi.image_codecs import encoder
from wsi.manifest import SKIPPED, WRITTEN, encode_row, staging_folder, write_record
from wsi.reader import Region, Slide, SlideError
from wsi.request_table import PatchRequest

Layout = Literal["files", "shards"]

SHARDS_FOLDER = "shards"


@dataclass(frozen=True)
class OutputSettings:
    """How patches are written.

    Attributes:
        layout: `files`: an image and a text file each, in one folder, with PathGen's names;
            `shards`: WebDataset tar files.
        image_format: `png`, `jpg` or `webp`.
        quality: 1 to 100; None for the format's own.
        part_size: Patches in a shard; in the other layout, patches that are recorded together.
    """

    layout: Layout = "files"
    image_format: str = "png"
    quality: int | None = None
    part_size: int = 1000

    def __post_init__(self) -> None:
        if self.layout not in ("files", "shards"):
            raise ValueError(f"layout {self.layout!r}: files or shards expected")
        if self.part_size < 1:
            raise ValueError(f"part_size: at least 1 expected, got {self.part_size}")
        encoder(self.image_format, self.quality)


@dataclass(frozen=True)
class Part:
    """What a worker is handed.

    Attributes:
        number: Of the part, counted from 0.
        requests: Sorted by slide and position.
        slides: File of each slide, or why there is none.
        out: The job's folder.
        settings: How to write.
        mpp: Micrometres per pixel of all slides, in place of what they say.
    """

    number: int
    requests: Sequence[PatchRequest]
    slides: dict[str, Path | str]
    out: Path
    settings: OutputSettings
    mpp: float | None = None

    @property
    def name(self) -> str:
        """Of the part's record, and of its shard."""
        return f"{self.number:06d}"


def write_part(part: Part) -> dict[str, Any]:
    """Extracts the patches of a part; what was left out and why stands in its record.

    Returns:
        How many were `written` and `skipped`.

    Raises:
        OSError: The output cannot be written: a full disk, for instance.
    """
    encode = encoder(part.settings.image_format, part.settings.quality)
    sink_type = ShardSink if part.settings.layout == "shards" else FileSink
    rows: list[dict[str, Any]] = []
    with sink_type(part) as sink:
        for slide_id, group in groupby(part.requests, key=lambda request: request.slide_id):
            requests = list(group)
            try:
                rows += _extract_slide(part, requests, encode, sink)
            except SlideError as error:
                missing = isinstance(part.slides[slide_id], str)
                reason = "slide missing" if missing else "slide unreadable"
                rows += [_skipped(request, reason, str(error)) for request in requests]
        sink.finish()
    return write_record(part.out, part.name, rows)


def _extract_slide(
    part: Part,
    requests: list[PatchRequest],
    encode: Callable[[NDArray[np.uint8]], bytes],
    sink: FileSink | ShardSink,
) -> list[dict[str, Any]]:
    path = part.slides[requests[0].slide_id]
    if isinstance(path, str):
        raise SlideError(path)
    rows: list[dict[str, Any]] = []
    with Slide(path, mpp=part.mpp) as slide:
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
    """An image file and a text file per patch, as PathGen's script names them.

    They are built aside, forced to disk and moved to their places when the part is complete.

    Args:
        part: The part to write.
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
        """Takes a patch; returns its row of the manifest."""
        stem = patch_stem(request)
        name = f"{stem}.{self._part.settings.image_format}"
        self._write(name, image)
        if request.caption is not None:
            self._write(f"{stem}.txt", request.caption.encode())
        return _written(request, name, image, mpp)

    def finish(self) -> None:
        """Puts everything in its place."""
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
    """A WebDataset shard: image, text and JSON of a patch under one key.

    Keys are numbers: the ids of slides hold dots, at which WebDataset would cut them off.

    Args:
        part: The part to write.
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
        """Takes a patch; returns its row of the manifest."""
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
        """Puts the shard in its place; a part without any patch leaves none."""
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
        # Time, owner and rights stay at TarInfo's constants: equal patches give equal shards.
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))


def patch_stem(request: PatchRequest) -> str:
    """Name of a patch's files, as PathGen's script forms it: slide, left, top."""
    return f"{request.slide_id}_{request.x_level0}_{request.y_level0}"


def pair_lines(rows: Iterator[dict[str, Any]], out: Path) -> Iterator[bytes]:
    """Lines of a `pairs.jsonl` for loose files with captions."""
    for row in rows:
        caption = (out / row["file"]).with_suffix(".txt") if row["state"] == WRITTEN else None
        if caption and caption.is_file():
            pair = {"id": row["id"], "image": row["file"], "caption": caption.read_bytes().decode()}
            yield encode_row(pair | {name: row[name] for name in ("wsi_id", "position", "mpp")})


def _written(request: PatchRequest, file: str, image: bytes, mpp: float | None) -> dict[str, Any]:
    from isal import isal_zlib

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
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
