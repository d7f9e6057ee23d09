"""Runs a function on every slide of a folder as a resumable job that skips slides with errors."""

from __future__ import annotations

import glob
import os
import re
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pathcore.files import StrPath, UnsafeNameError, check_name, sha256_of
from pathcore.jobs import (
    SKIPPED,
    WORKER_DIED,
    WRITTEN,
    JobFolder,
    Report,
    UnitError,
    write_record,
)
from pathcore.pool import PoolOptions, WorkerDiedError
from wsi.slide_listing import AmbiguousSlideError, SlideListing

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAME_ROOM_BYTES = 40
"""Number of bytes reserved for suffixes of output files and for names of temporary files."""


@dataclass(frozen=True)
class SlideUnit:
    """A slide of a job.

    Attributes:
        slide_id: Id of the slide; checked to be safe as a file name before `process` is called.
        path: The slide, or a folder of tiles.
        out: The folder of the job.
        mpp: Micrometres per pixel that a table of slides states.
        mask: Tissue mask that a table of slides names.
    """

    slide_id: str
    path: Path
    out: Path
    mpp: float | None = None
    mask: Path | None = None

    @property
    def record(self) -> str:
        """Name of the slide's record in the job, safe as a file name for any id."""
        # The id keeps records sorted; the checksum distinguishes ids that are equal in their first
        # hundred bytes, or but for characters that no file name may contain.
        head = self.slide_id.encode(errors="replace")[:100].decode(errors="ignore")
        head = re.sub(r"[\x00-\x1f\x7f/\\]", "_", head.lstrip())
        return f"{head}-{zlib.crc32(self.slide_id.encode(errors='surrogateescape')):08x}"


Unit = TypeVar("Unit", bound=SlideUnit)

Beside = Callable[[SlideUnit], Path | None]
"""Returns the mask or the coordinates of a slide, None if it has neither; picklable."""


def table_mask(unit: SlideUnit) -> Path | None:
    """Returns the mask that a table of slides names."""
    return unit.mask


def slide_source(unit: SlideUnit, beside: Beside = table_mask) -> dict[str, Any] | None:
    """Returns what the output of a slide depends on, as JSON values; None if a file is missing.

    Modification times are left out, since copies of the slides give the same output.
    """
    path = unit.path
    try:
        size = len(os.listdir(path)) if path.is_dir() else path.stat().st_size
        file = beside(unit)
        digest = "" if file is None else sha256_of(file)
    except (OSError, ValueError):
        return None
    return {"name": path.name, "size": size, "mpp": unit.mpp, "beside": digest}


@dataclass(frozen=True)
class _SlideFunction(Generic[Unit]):
    """Processes a slide and writes its record; picklable, unlike a closure."""

    process: Callable[[Unit], Mapping[str, Any]]
    noun: str = "slide"
    source: Callable[[Unit], Any] | None = None

    def __call__(self, unit: Unit) -> dict[str, Any]:
        try:
            check_name(unit.slide_id, room_bytes=_NAME_ROOM_BYTES)
            # Before the slide is read, in case it changes meanwhile.
            source = self.source(unit) if self.source else None
            row = {self.noun: unit.slide_id, "state": WRITTEN, **self.process(unit)}
            if source is not None:
                row["source"] = source
        except UnsafeNameError as error:
            return self.skip(unit, "bad id", str(error))
        except UnitError as error:
            return self.skip(unit, error.reason, str(error))
        except MemoryError as error:
            return self.skip(unit, "out of memory", f"{unit.path}: {error or 'out of memory'}")
        except (OSError, RuntimeError):
            raise  # for instance a full disk or a broken GPU, which affects every slide
        except ValueError as error:
            return self.skip(unit, UnitError.reason, str(error))
        except Exception as error:  # any other fault is blamed on the slide
            where = traceback.extract_tb(error.__traceback__)[-1]
            detail = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return self.skip(unit, "unexpected error", detail)
        return write_record(unit.out, unit.record, [row])

    def skip(self, unit: Unit, reason: str, detail: str) -> dict[str, Any]:
        """Records a slide as skipped."""
        row = {self.noun: unit.slide_id, "state": SKIPPED, "reason": reason, "detail": detail}
        return write_record(unit.out, unit.record, [row])


def process_units(
    process: Callable[[Unit], Mapping[str, Any]],
    units: Iterable[Unit],
    job: JobFolder,
    *,
    num_inputs: int,
    noun: str = "slide",
    source: Callable[[Unit], Any] | None = None,
    progress: bool = True,
    **pool: Unpack[PoolOptions],
) -> None:
    """Processes the units of a job that have no record yet; goes on after bad ones.

    Args:
        process: See `process_slides`.
        units: All units of the job; a subclass of `SlideUnit` may carry what else `process` needs.
        job: The open job.
        num_inputs: Number of units, including those that are skipped before.
        noun: What a unit is; the name of its id in the manifest.
        source: Function that returns what the output of a unit depends on, as JSON values, or None
            if that is gone; picklable. Rows record it, for `forget_changed`.
        progress: Whether to show a progress bar.
        **pool: See `PoolOptions`.
    """
    function, done = _SlideFunction(process, noun, source), job.done()

    def record_death(unit: Unit, error: WorkerDiedError) -> Iterable[Unit]:
        function.skip(unit, WORKER_DIED, f"{unit.path}: {error}")
        return ()

    job.run(
        function,
        (unit for unit in units if unit.record not in done),
        on_death=record_death,
        num_inputs=num_inputs,
        noun=noun,
        progress=progress,
        **pool,
    )


def process_slides(
    process: Callable[[SlideUnit], Mapping[str, Any]],
    slides: StrPath,
    out: StrPath,
    inputs: Mapping[str, Any],
    *,
    folders: Iterable[str] = (),
    exclude: Iterable[StrPath | None] = (),
    tile_folders: bool = False,
    beside: Beside = table_mask,
    at_end: Callable[[JobFolder], None] | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
    **pool: Unpack[PoolOptions],
) -> Report:
    """Processes every slide of a folder in a resumable job.

    A slide that cannot be processed, or that kills its worker, is recorded as skipped. A slide that
    is done is processed again if its name, size or stated resolution, or the file `beside` it,
    changed.

    Args:
        process: Function that processes one slide and returns the fields of its row in the
            manifest. It must be picklable, and raises `UnitError` for a slide to be skipped.
        slides: The folder, one slide, or a table of slides; see `SlideListing`.
        out: Output folder; a job that was stopped continues in it.
        inputs: Settings that determine the output; see `JobFolder`.
        folders: Names of the folders in `out` that `process` writes to.
        exclude: Folders under `slides` that are not searched for slides, besides `out`.
        tile_folders: Whether folders of tiles are inputs too; see `SlideListing`.
        beside: Function that returns the mask or the coordinates of a slide.
        at_end: Function that is called when all slides are done, before the report is written.
        retry_skipped: Whether to process slides again that an earlier run skipped.
        progress: Whether to show a progress bar.
        **pool: See `PoolOptions`.

    Raises:
        FileNotFoundError: If `slides` does not exist or contains no slides.
        OutputExistsError: If `out` contains something else.
        FolderInUseError: If another run is writing to `out`.
    """
    excluded = [path for path in (out, *exclude) if path is not None]
    listing = SlideListing(slides, exclude=excluded, tile_folders=tile_folders)
    if not len(listing):
        hint = " nor a tile like 01581x_25327y.png" if tile_folders else ""
        found = f"; passed over {len(listing.passed_over)} files" if listing.passed_over else ""
        raise FileNotFoundError(
            f"slides {slides}: {'neither a slide' + hint if hint else 'no slide'} in this folder"
            f"{found}"
        )
    with JobFolder(out, inputs, retry_skipped=retry_skipped) as job:
        for name in folders:
            (job.out / name).mkdir(exist_ok=True)
        done = job.done()
        for slide_id, detail in listing.ambiguous.items():
            unit = SlideUnit(slide_id, listing.folder, job.out)
            if unit.record not in done:
                _SlideFunction(process).skip(unit, AmbiguousSlideError.reason, detail)
        units = [
            SlideUnit(name, path, job.out, listing.mpp.get(name), listing.masks.get(name))
            for name, path in listing.slides.items()
        ]
        source = partial(slide_source, beside=beside)
        forget_changed(job, units, source)
        process_units(
            process,
            units,
            job,
            num_inputs=len(listing),
            source=source,
            progress=progress,
            **pool,
        )
        if at_end is not None:
            at_end(job)
        return job.finish(passed_over=(found.row() for found in listing.passed_over))


def forget_changed(
    job: JobFolder, units: Iterable[Unit], source: Callable[[Unit], Any], *, noun: str = "slide"
) -> list[Unit]:
    """Removes record and output of the units that are done but changed since, and returns them.

    Args:
        job: The open job.
        units: All units of the job.
        source: See `process_units`.
        noun: See `process_units`.
    """
    then = {row[noun]: row["source"] for row in job.rows() if "source" in row}
    changed = []
    for unit in units:
        now = source(unit) if unit.slide_id in then else None
        if now is None or now == then[unit.slide_id]:
            continue  # what was made of a slide that is gone stays
        changed.append(unit)
        job.forget(unit.record)
        # If the slide is skipped this time, later steps must not find its old output.
        for path in job.out.glob(f"[!.]*/**/{glob.escape(unit.slide_id)}.*"):
            if path.stem == unit.slide_id:
                path.unlink()
    return changed
