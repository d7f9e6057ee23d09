"""Finds the slides in a folder, or reads them from a table.

All commands share these rules: a DICOM series is one slide; part files of a multi-file format and
thumbnails beside a slide are not slides. Ids from data are looked up in the listing and never
become paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathcore.files import StrPath
from pathcore.jobs import UnitError, is_job_output
from pathcore.rows import read_csv
from wsi.openers import PLAIN_SUFFIXES, SLIDE_SUFFIXES

TILE_NAME = re.compile(r"(-?\d+)x_(-?\d+)y\.(?:png|jpe?g|tiff?|bmp|webp)", re.IGNORECASE)
"""Names of tile images by position, as Prov-GigaPath's tiler writes them; `xtuner-add embed` takes
folders of such images."""

_MULTI_FILE_SUFFIXES = (".vms", ".vmu")
"""Formats of Hamamatsu in which the slide is a text file that names JPEG or NGR files."""

_MAX_KEY_FILE_BYTES = 1 << 20

_COLUMNS = {
    "path": ("path", "image_path", "wsi"),
    "id": ("slide_id", "sample_id"),
    "mpp": ("mpp", "spacing_at_level_0"),
    "mask": ("mask", "mask_path"),
}
"""Columns of a table of slides. The second names are those of slide2vec
(https://github.com/clemsgrs/slide2vec), `wsi` and `mpp` those of TRIDENT."""


class SlideNotFoundError(UnitError):
    """Raised if no slide has the requested id."""

    reason = "slide missing"


class AmbiguousSlideError(UnitError):
    """Raised if several slides have the requested id."""

    reason = "ambiguous slide name"


@dataclass(frozen=True)
class PassedOver:
    """A file or folder that was found but does not count as a slide.

    Attributes:
        path: The file or folder.
        reason: Category, in a few words.
        detail: Evidence for the category.
    """

    path: Path
    reason: str
    detail: str = ""

    def row(self) -> dict[str, str]:
        """Returns a JSON row for the report of a job."""
        detail = {"detail": self.detail} if self.detail else {}
        return {"file": str(self.path), "reason": self.reason, **detail}


class SlideListing:
    """Slides under a folder or in a table, by id.

    The id of a slide is its file name without suffix. The id of a DICOM series with several files
    is its SeriesInstanceUID, and the names of its files are aliases. Subfolders are searched, since
    the GDC's transfer tool creates one per slide, and links to folders are followed. The output of
    earlier jobs is not searched.

    A table is a CSV file with a row per slide. `path` (or TRIDENT's `wsi`, slide2vec's
    `image_path`) is absolute or relative to the folder of the table; `slide_id` (`sample_id`) is by
    default the file name without suffix; `mpp` (`spacing_at_level_0`) and `mask` (`mask_path`) may
    be empty. Other columns, such as labels and splits, are for other commands.

    Args:
        folder: The folder, a single slide, or a table ending in `.csv`.
        exclude: Folders that are not searched, for instance masks or the output of this job.
        tile_folders: Whether folders of tiles named like `01581x_25327y.png` count as slides, with
            the name of the folder as id.
        inside_only: Whether to ignore links that lead out of `folder`.

    Attributes:
        slides: Path of every slide, or of every folder of tiles, by id; sorted by id.
        paths: Paths of all slides, including those with ambiguous ids; sorted.
        ambiguous: Message for each id that several slides have.
        passed_over: Files and folders that were found but do not count as slides.
        mpp: Micrometres per pixel by id, as far as the table states them.
        masks: File of the tissue mask by id, as far as the table names one.

    Raises:
        FileNotFoundError: If `folder` does not exist.
        ValueError: If the table has no column of paths, a row cannot be used, or two rows of one
            slide contradict each other.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("a.svs", "a.png", "._a.svs"):
        ...     (folder / name).touch()
        >>> listing = SlideListing(folder)
        >>> [path.name for path in listing.slides.values()]
        ['a.svs']
        >>> [(found.path.name, found.reason) for found in listing.passed_over]
        [('._a.svs', 'macOS metadata'), ('a.png', 'picture of a slide')]
    """

    def __init__(
        self,
        folder: StrPath,
        *,
        exclude: Iterable[StrPath] = (),
        tile_folders: bool = False,
        inside_only: bool = False,
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.passed_over: list[PassedOver] = []
        self._aliases: dict[str, str] = {}
        self._found: dict[str, list[Path]] = {}
        self._excluded = {os.path.realpath(path) for path in exclude}
        self._tile_folders = tile_folders
        self._inside_only = inside_only
        self.mpp: dict[str, float] = {}
        self.masks: dict[str, Path] = {}
        if self.folder.suffix.lower() == ".csv":
            self._read_table()
        elif self.folder.is_dir():
            self._walk()
            self._pass_over_pictures()
        elif self.folder.exists():
            self._found[self.folder.stem] = [self.folder]
        else:
            raise FileNotFoundError(f"slides {folder}: no such file or folder")
        self.paths = sorted(path for paths in self._found.values() for path in _distinct(paths))
        self.slides: dict[str, Path] = {}
        self.ambiguous: dict[str, str] = {}
        for slide_id, paths in sorted(self._found.items()):
            if len(distinct := _distinct(paths)) == 1:
                self.slides[slide_id] = distinct[0]
            else:
                shown = ", ".join(map(str, distinct[:3])) + (", ..." if len(distinct) > 3 else "")
                self.ambiguous[slide_id] = (
                    f"{len(distinct)} slides have this name: {shown}; rename one, or give the path "
                    "of the one to take"
                )

    def __len__(self) -> int:
        return len(self._found)

    def find(self, slide_id: str) -> Path:
        """Returns the path of a slide.

        Raises:
            SlideNotFoundError: If no slide has this id.
            AmbiguousSlideError: If several slides have it.
        """
        slide_id = slide_id if slide_id in self._found else self._aliases.get(slide_id, slide_id)
        if slide_id in self.slides:
            return self.slides[slide_id]
        if slide_id in self.ambiguous:
            raise AmbiguousSlideError(self.ambiguous[slide_id])
        raise SlideNotFoundError(f"no slide of this name under {self.folder}: {slide_id!r:.80}")

    def _read_table(self) -> None:
        folder = self.folder.parent
        lines: dict[tuple[str, str], int] = {}
        for line, row in read_csv(self.folder, what="slides"):
            found = {
                key: next((text for name in names if (text := (row.get(name) or "").strip())), "")
                for key, names in _COLUMNS.items()
            }
            where = f"slides {self.folder}:{line}"
            if not found["path"]:
                names = ", ".join(_COLUMNS["path"])
                raise ValueError(f"{where}: expected a path in one of {names}; found columns "
                                 f"{', '.join(map(str, row))}")  # fmt: skip
            path = folder / found["path"]
            slide_id = found["id"] or path.stem
            # A repeated row is one slide; two files with the same id are ambiguous.
            self._found.setdefault(slide_id, []).append(path)
            stated: dict[str, tuple[dict[str, Any], Any]] = {
                "mpp": (self.mpp, _mpp(found["mpp"], where) if found["mpp"] else None),
                "mask": (self.masks, folder / found["mask"] if found["mask"] else None),
            }
            for key, (known, value) in stated.items():
                if value is None:
                    continue
                first = lines.setdefault((key, slide_id), line)
                if known.setdefault(slide_id, value) != value and (
                    len(_distinct(self._found[slide_id])) == 1
                ):
                    raise ValueError(
                        f"{where}: {key} of {slide_id}: {found[key]}, but {known[slide_id]} in "
                        f"line {first}; remove the row that is wrong"
                    )

    def _walk(self) -> None:
        """Lists all folders; follows links last, so that slides are found under their own paths."""
        seen: set[str] = set()
        links: list[Path] = []
        queue = [self.folder]
        while queue or links:
            folder = queue.pop() if queue else links.pop(0)
            real = os.path.realpath(folder)
            if real in seen:
                self._pass(folder, "link to a folder that is searched already", real)
                continue
            seen.add(real)
            for child in self._list_folder(folder):
                (links if child.is_symlink() else queue).append(child)

    def _list_folder(self, folder: Path) -> list[Path]:
        """Adds the slides of a folder; returns the subfolders to search."""
        entries = sorted(folder.iterdir())
        multi_file = [e for e in entries if e.suffix.lower() in _MULTI_FILE_SUFFIXES]
        parts = {name: path for path in multi_file for name in _files_named_in(path)}
        folders, dicom, has_tiles = [], [], False
        for path in entries:
            suffix = path.suffix.lower()
            if path.is_dir():
                if self._is_searched(path):
                    folders.append(path)
            elif suffix not in (*SLIDE_SUFFIXES, *PLAIN_SUFFIXES):
                continue
            elif path.name.startswith("._"):
                self._pass(path, "macOS metadata")
            elif path.name.startswith("."):
                self._pass(path, "hidden file")
            elif path.name in parts and path not in multi_file:
                self._pass(path, "part of a slide", f"named in {parts[path.name].name}")
            elif self._inside_only and not self._is_inside(path):
                self._pass(path, "link to a path outside the folder")
            elif TILE_NAME.fullmatch(path.name):
                has_tiles = True
            elif suffix == ".dcm":
                dicom.append(path)
            else:
                self._found.setdefault(path.stem, []).append(path)
        self._add_dicom(dicom)
        if has_tiles and self._tile_folders:
            self._found.setdefault(folder.name, []).append(folder)
            for path in entries:  # other pictures in the folder, such as an index of the tiles
                if path.suffix.lower() in PLAIN_SUFFIXES and path in self._found.get(path.stem, ()):
                    self._drop(path, "picture in a folder of tiles")
        elif has_tiles:
            self._pass(folder, "folder of tiles", "`embed` takes such folders")
        return folders

    def _is_searched(self, folder: Path) -> bool:
        if os.path.realpath(folder) in self._excluded:
            pass  # output, masks or coordinates of this command, which need no mention
        elif is_job_output(folder):
            self._pass(folder, "output of a job", "it contains .job")
        elif folder.name.startswith("."):
            self._pass(folder, "hidden folder")
        elif self._inside_only and not self._is_inside(folder):
            self._pass(folder, "link to a path outside the folder")
        elif (folder / "Slidedat.ini").is_file() and folder.with_suffix(".mrxs").is_file():
            pass  # data of a MIRAX slide
        else:
            return True
        return False

    def _is_inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))

    def _add_dicom(self, paths: list[Path]) -> None:
        """Groups the DICOM files of a folder by series and adds one file of each.

        OpenSlide finds the other files of the series in the same folder.
        """
        series: dict[str, list[tuple[int, Path]]] = {}
        for path in paths:
            header = _dicom_header(path)
            uid = str(header.get("SeriesInstanceUID", "")) if header is not None else ""
            # A file without a series counts as a slide, so that opening it reports what is wrong.
            columns = int(header.get("TotalPixelMatrixColumns", 0) or 0) if header else 0
            series.setdefault(uid or str(path), []).append((columns, path))
        for uid, members in series.items():
            if len(members) == 1:
                self._found.setdefault(members[0][1].stem, []).append(members[0][1])
                continue
            # The widest instance is level 0; the name makes the choice deterministic.
            best = min(members, key=lambda member: (-member[0], member[1].name))[1]
            self._found.setdefault(uid, []).append(best)
            for _, path in members:
                self._aliases[path.stem] = uid

    def _pass_over_pictures(self) -> None:
        """Removes plain images that belong to a slide, such as thumbnails, masks and overlays.

        Their names equal the id of the slide, or begin or end with it: `a.png`, `a_thumbnail.jpg`,
        `mask-a.png`.
        """
        slides = {
            slide_id
            for slide_id, paths in self._found.items()
            if any(path.suffix.lower() in SLIDE_SUFFIXES for path in paths)
        }
        for stem, paths in list(self._found.items()):
            cuts = list(re.finditer(r"[^A-Za-z0-9]", stem))
            names = [stem, *(stem[: c.start()] for c in cuts), *(stem[c.end() :] for c in cuts)]
            slide = next((name for name in names if name in slides), None)
            for path in list(paths):
                if slide is not None and path.suffix.lower() in PLAIN_SUFFIXES:
                    self._drop(path, "picture of a slide", f"of {self._found[slide][0].name}")

    def _pass(self, path: Path, reason: str, detail: str = "") -> None:
        self.passed_over.append(PassedOver(path, reason, detail))

    def _drop(self, path: Path, reason: str, detail: str = "") -> None:
        self._found[path.stem].remove(path)
        if not self._found[path.stem]:
            del self._found[path.stem]
        self._pass(path, reason, detail)


def _mpp(text: str, where: str) -> float:
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not 0 < mpp < 1000:
        raise ValueError(f"{where}: mpp: expected micrometres per pixel, found {text!r:.40}")
    return mpp


def _distinct(paths: list[Path]) -> list[Path]:
    """Removes links to files that are already listed."""
    if len(paths) == 1:  # resolving a path takes several system calls, slow on network disks
        return paths
    return list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]


def _files_named_in(path: Path) -> Iterator[str]:
    """Yields the values of a multi-file slide's key file, which include the names of its files."""
    with path.open("rb") as file:
        text = file.read(_MAX_KEY_FILE_BYTES).decode("utf-8", "replace")
    for line in text.splitlines():
        _, separator, value = line.partition("=")
        if separator and value.strip():
            yield value.strip()


def _dicom_header(path: Path) -> Any:
    """Returns the header of a DICOM file as a data set of pydicom; None if it is not DICOM."""
    import pydicom  # takes a tenth of a second, and few folders contain DICOM

    try:
        return pydicom.dcmread(
            path,
            stop_before_pixels=True,
            specific_tags=["SeriesInstanceUID", "TotalPixelMatrixColumns"],
        )
    except (OSError, pydicom.errors.InvalidDicomError, ValueError, EOFError):
        return None
