"""Selects representative patches of many slides, as a parallel, resumable job.

Writes into one folder:

    features/<encoder>/<slide>.h5   features of all patches, reused by later runs
    coords/<slide>.h5               selected patches, for `xtuner-add extract`
    pictures/<slide>.jpg            clusters and selected patches on the slide
    geojson/<slide>.geojson         selected patches for QuPath, on request
    selection.jsonl                 one row per selected patch, with the reason; sorted by slide
    selection.skipped.jsonl         slides and patches that were skipped, and why

and what every job leaves (`manifest.jsonl`, `skipped.jsonl`, `report.json`, `.job/`). The folder
belongs to one encoder and batch size. Settings that only change which patches are selected may
change between runs: the selection is made again from the stored features.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcore.device_claims import Placement
from pathcore.encoders import Encoder, EncoderError, create_encoder
from pathcore.encoders.encoder import default_precision
from pathcore.files import StrPath, atomic_file, sha256_of, write_json
from pathcore.jobs import SKIPPED, WRITTEN, JobFolder, Report, UnitError
from pathcore.pool import PoolOptions
from pathcore.rows import write_rows
from pathgen.selection.features import slide_features
from pathgen.selection.picture import SOURCE_COLOURS, draw_selection
from pathgen.selection.sampling import (
    FRACTIONS,
    Choice,
    Source,
    Texts,
    check_settings,
    load_classes,
    select,
    split_report,
)
from wsi.features import TileEmbeddings
from wsi.geojson import square_features, write_geojson
from wsi.reader import Slide
from wsi.report import save_jpeg
from wsi.slide_job import SlideUnit, forget_changed, process_units, slide_source
from wsi.slide_listing import SlideListing
from wsi.store import Coordinates, read_attributes, read_coordinates, write_features
from wsi.tile_job import DAMAGED

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

ROWS_NAME, SKIPPED_NAME = "selection.jsonl", "selection.skipped.jsonl"

_CACHED = "features were cached"

Descriptions = tuple[tuple[str, str], ...]
"""Pairs of class and description."""


@dataclass(frozen=True)
class SelectionSettings:
    """How patches are selected.

    Attributes:
        quota: Maximum number of patches per slide; PathGen takes 256.
        fractions: Fraction of the quota by source.
        clusters: Rule for the number of clusters, see `cluster_count`.
        max_similarity: Cosine similarity above which two patches are near-duplicates.
        seed: Seed of k-means and of the draw within clusters.
        classes: JSON file of class descriptions; by default that of this package.
        cancer_type: Cancer type of slides that `cancer_types` does not name.
        batch_size: Number of patches per batch.
        pictures: Whether to draw pictures.
        geojson: Whether to write the selected patches as GeoJSON.

    Raises:
        ValueError: If a number or the rule for clusters is invalid.
    """

    quota: int = 256
    fractions: Mapping[Source, float] = field(default_factory=lambda: dict(FRACTIONS))
    clusters: str = "sqrt"
    max_similarity: float = 0.95
    seed: int = 0
    classes: str | None = None
    cancer_type: str | None = None
    batch_size: int = 64
    pictures: bool = True
    geojson: bool = False

    def __post_init__(self) -> None:
        check_settings(self.quota, self.fractions, self.clusters, self.max_similarity)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {self.batch_size}")


@dataclass
class SelectionReport(Report):
    """Outcome of a selection; an input is a slide that has coordinates.

    Attributes:
        num_patches: Number of patches selected.
    """

    num_patches: int = 0


@dataclass(frozen=True)
class EncoderSpec:
    """Image-text encoder as a plain value that can be sent to other processes.

    Attributes:
        name: Name for `create_encoder`.
        precision: Precision for `create_encoder`.
        digest: SHA-256 of the weights.
    """

    name: str
    precision: str
    digest: str


@dataclass(frozen=True)
class _SelectionUnit(SlideUnit):
    """A slide with what is known about it.

    Attributes:
        coords: The coordinates file.
        descriptions: Descriptions for the slide's cancer type.
        report: Text of the slide's report, if there is one.
        missing: Why there is no such slide.
    """

    coords: Path = Path()
    descriptions: Descriptions = ()
    report: str | None = None
    missing: UnitError | None = None


class _OpenEncoder:
    """An open encoder with the features of descriptions, which many slides share."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._prompts: dict[Descriptions, Texts] = {}

    def prompts(self, descriptions: Descriptions) -> Texts:
        if descriptions not in self._prompts:
            labels, texts = [pair[0] for pair in descriptions], [pair[1] for pair in descriptions]
            features = self.encoder.encode_texts(texts).numpy()
            self._prompts[descriptions] = Texts(texts, labels, features)
        return self._prompts[descriptions]

    def sentences(self, report: str | None) -> Texts | None:
        sentences = split_report(report or "")
        if not sentences:
            return None
        features = self.encoder.encode_texts(sentences).numpy()
        return Texts(sentences, [""] * len(sentences), features)


def select_patches(
    coords: StrPath,
    slides: StrPath,
    output: StrPath,
    encoder: Encoder | str,
    settings: SelectionSettings | None = None,
    *,
    cancer_types: Mapping[str, str] | None = None,
    reports: Mapping[str, str] | None = None,
    placement: Placement | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
    **pool: Unpack[PoolOptions],
) -> SelectionReport:
    """Selects patches of every slide that has a coordinates file.

    Args:
        coords: Folder of coordinates files, `<slide>.h5` or `<slide>_patches.h5`.
        slides: Folder of the slides.
        output: Output folder; the docstring of this module lists its files. A job that was stopped
            continues in it.
        encoder: Name of an image-text encoder for `pathcore.create_encoder`, which each worker
            opens. An encoder that is open already works in this process, one slide after the other,
            so a slide that crashes it ends the run.
        settings: How patches are selected.
        cancer_types: Slide -> TCGA code. Entries of other slides are listed in
            `passed_over.jsonl`, and so are those of `reports`.
        reports: Slide -> text of its report.
        placement: Device of an encoder that is given by name, and reading processes.
        retry_skipped: Whether to process slides again that an earlier run skipped.
        progress: Whether to show a progress bar.
        **pool: See `pathcore.pool.PoolOptions`; a task is a slide. Several workers, and Ray, need
            the name of the encoder.

    Returns:
        The report; `incomplete` counts the slides with patches that could not be read.

    Raises:
        FileNotFoundError: If there are no coordinates, or the folder of slides is missing.
        ValueError: If a cancer type has no descriptions, no entry of `cancer_types` or `reports` is
            for one of the slides, the encoder has no text tower, or an open encoder is given
            together with a device, several workers or Ray.
        OutputExistsError: If `output` contains something else, or features of another encoder.
        FolderInUseError: If another run is writing to `output`.
    """
    settings, output = settings or SelectionSettings(), Path(os.path.abspath(output))
    files = _coordinates_files(Path(coords))
    unmatched = [
        *_unmatched(cancer_types, files, "cancer type"),
        *_unmatched(reports, files, "report"),
    ]
    listing = SlideListing(slides, exclude=[output, coords])
    units = _units(files, listing, output, settings, cancer_types or {}, reports or {})
    placement = placement or Placement()
    engine = pool.setdefault("engine", "process")
    workers = pool.setdefault("workers", 1)
    opened: EncoderSpec | _OpenEncoder
    if isinstance(encoder, Encoder):
        if (workers, engine, placement.device) != (1, "process", None):
            raise ValueError(
                f"encoder {encoder.name}: is open already, so it stays in this process and on its "
                "device; for workers, engine or device give its name instead"
            )
        _check_has_text(encoder)
        opened, described = _OpenEncoder(encoder), encoder.describe()
        pool["engine"] = "inline"
        placement = replace(placement, tile_bar=progress)
    else:
        placement = placement.for_job(workers=workers, engine=engine, progress=progress)
        opened, described = _describe(encoder, str(placement.device))
        pool |= placement.pool
    inputs = {
        "operation": "select-patches",
        "encoder": described,
        "batch_size": settings.batch_size,
    }
    if (output / ROWS_NAME).is_file():  # perhaps of version 0.1.0, whose features are kept
        (output / ".job").mkdir(exist_ok=True)
    with JobFolder(output, inputs, retry_skipped=retry_skipped) as job:
        _forget_changed(job, units, settings)
        process_units(
            partial(_select_slide, encoder=opened, settings=settings, placement=placement),
            units,
            job,
            num_inputs=len(units),
            source=slide_source,
            progress=progress,
            **pool,
        )
        num_patches = _write_tables(job)
        passed_over = [*unmatched, *(found.row() for found in listing.passed_over)]
        report = job.finish(passed_over=passed_over)
    return SelectionReport(**asdict(report), num_patches=num_patches)


def read_table(path: StrPath, field_name: str) -> dict[str, str]:
    """Reads a mapping from slide to text: JSON lines with `wsi_id` and the field, or one object.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            table = {row["wsi_id"]: row[field_name] for row in rows}
        else:
            table = dict(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected lines with wsi_id and {field_name}, or an object of texts: {error!r}"
        ) from error
    wrong = next((k for k, v in table.items() if not isinstance(v, str)), None)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong!r}: expected text, found {table[wrong]!r:.80}")
    return table


def _coordinates_files(folder: Path) -> dict[str, Path]:
    """Returns the coordinates files by slide, sorted by slide."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.h5")):
        name = path.stem.removesuffix("_patches")
        if path.name.startswith("."):
            continue
        if name in files:
            raise ValueError(
                f"coordinates {folder}: both {files[name].name} and {path.name} are of slide "
                f"{name}; remove one"
            )
        files[name] = path
    if not files:
        raise FileNotFoundError(f"coordinates {folder}: no .h5 files")
    return dict(sorted(files.items()))


def _unmatched(
    table: Mapping[str, str] | None, files: Mapping[str, Path], what: str
) -> list[dict[str, str]]:
    """Returns a row for each entry of a table that is for no slide with coordinates."""
    others = sorted({*(table or ())} - {*files})
    if others and len(others) == len(table or ()):
        raise ValueError(
            f"{what}s: none of {len(others):,} entries, such as {others[0]!r:.80}, is for a slide "
            f"with coordinates, such as {next(iter(files))!r}; name slides like their coordinates "
            "files, without .h5"
        )
    return [{"slide": n, "reason": f"{what} of a slide without coordinates"} for n in others]


def _describe(name: str, device: str) -> tuple[EncoderSpec, dict[str, Any]]:
    """Describes an encoder; opens it on the CPU, because the digest needs the weights."""
    encoder = create_encoder(name, device="cpu", precision=default_precision(name, device))
    _check_has_text(encoder)
    return EncoderSpec(name, encoder.precision, encoder.digest), encoder.describe()


def _check_has_text(encoder: Encoder) -> None:
    if not encoder.has_text:
        raise EncoderError(f"encoder {encoder.name}: has no text tower")


def _units(
    files: Mapping[str, Path],
    listing: SlideListing,
    out: Path,
    settings: SelectionSettings,
    cancer_types: Mapping[str, str],
    reports: Mapping[str, str],
) -> list[_SelectionUnit]:
    descriptions = {
        kind: tuple(load_classes(kind, settings.classes))
        for kind in {settings.cancer_type, *cancer_types.values()}
    }
    units = []
    for name, file in files.items():
        path, missing = listing.folder, None
        try:
            path = listing.find(name)
        except UnitError as error:
            missing = error
        kind = cancer_types.get(name, settings.cancer_type)
        units.append(
            _SelectionUnit(
                name,
                path,
                out,
                coords=file.absolute(),
                descriptions=descriptions[kind],
                report=reports.get(name),
                missing=missing,
            )
        )
    return units


def _forget_changed(
    job: JobFolder, units: Sequence[_SelectionUnit], settings: SelectionSettings
) -> None:
    """Removes the records of slides that changed, are no longer wanted or are selected from anew.

    Features of slides that did not change stay; `slide_features` checks whether they can be used.
    """
    if forget_changed(job, [unit for unit in units if unit.missing is None], slide_source):
        # What is left must not look like one finished selection.
        (job.out / ROWS_NAME).unlink(missing_ok=True)
    path = job.folder / "selections.json"
    then = json.loads(path.read_bytes()) if path.is_file() else {}
    now = {unit.record: _digest(unit, settings) for unit in units}
    names = {SlideUnit(row["slide"], job.out, job.out).record: row["slide"] for row in job.rows()}
    for record, name in names.items():
        if now.get(record) == then.get(record):
            continue
        (job.out / ROWS_NAME).unlink(missing_ok=True)
        job.forget(record)
        (job.out / "coords" / f"{name}.h5").unlink(missing_ok=True)
    write_json(path, now)


def _digest(unit: _SelectionUnit, settings: SelectionSettings) -> str:
    """Returns a string that changes if other patches could be selected or other files written."""
    described = {
        **asdict(settings),
        "classes": unit.descriptions,
        "cancer_type": None,  # these two only matter through the descriptions
        "coords": sha256_of(unit.coords),
        "report": unit.report,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _write_tables(job: JobFolder) -> int:
    """Joins the rows of all slides, sorted by slide; returns the number of patches."""
    slides = sorted(job.rows(), key=lambda row: str(row["slide"]))
    skipped = []
    for row in slides:
        if row["state"] == SKIPPED:
            skipped.append({"wsi_id": row["slide"], "reason": row["detail"]})
        elif row["damaged"]:
            reason = f"{row['damaged']} patches cannot be read"
            skipped.append({"wsi_id": row["slide"], "reason": reason})
    write_rows(job.out / SKIPPED_NAME, skipped)
    written = [row for row in slides if row["state"] == WRITTEN]
    with atomic_file(job.out / ROWS_NAME) as partial_path, partial_path.open("wb") as file:
        for row in written:
            with _rows_file(SlideUnit(row["slide"], job.out, job.out)).open("rb") as rows:
                shutil.copyfileobj(rows, file)
    return sum(row["patches"] for row in written)


def _rows_file(unit: SlideUnit) -> Path:
    return unit.out / ".job" / "rows" / f"{unit.record}.jsonl"


@lru_cache(maxsize=1)
def _open_encoder(spec: EncoderSpec, device: torch.device) -> _OpenEncoder:
    """Returns the encoder of this worker, opened once, not once per slide."""
    encoder = create_encoder(spec.name, device=device, precision=spec.precision)
    if encoder.digest != spec.digest:
        # Not a ValueError, which would be blamed on the slide.
        raise RuntimeError(f"encoder {spec.name}: its weights have changed meanwhile")
    return _OpenEncoder(encoder)


def _select_slide(
    unit: _SelectionUnit,
    encoder: EncoderSpec | _OpenEncoder,
    settings: SelectionSettings,
    placement: Placement,
) -> dict[str, Any]:
    """Selects patches of a slide and writes all its files; returns its row of the manifest."""
    if unit.missing is not None:
        raise unit.missing
    if isinstance(encoder, EncoderSpec):
        encoder = _open_encoder(encoder, placement.worker_device(unit.out))
    coordinates, name = read_coordinates(unit.coords), unit.slide_id
    found = slide_features(
        unit.path,
        unit.coords,
        encoder.encoder,
        unit.out / "features",
        batch_size=settings.batch_size,
        workers=placement.read_workers,
        progress=placement.tile_bar,
    )
    choices, labels = select(
        found.features,
        settings.quota,
        prompts=encoder.prompts(unit.descriptions),
        report=encoder.sentences(unit.report),
        fractions=settings.fractions,
        clusters=settings.clusters,
        max_similarity=settings.max_similarity,
        seed=settings.seed,
    )
    encoder_name = encoder.encoder.folder_name
    _write_coords(unit, found, choices, encoder_name)
    if settings.geojson:
        _write_geojson(unit, coordinates.size_level0, found, choices)
    if settings.pictures:
        with Slide(unit.path) as slide:
            picture = draw_selection(slide, found.coords, coordinates.size_level0, labels, choices)
        (unit.out / "pictures").mkdir(exist_ok=True)
        save_jpeg(picture, unit.out / "pictures" / f"{name}.jpg")
    rows = [_row(unit, choice, coordinates, found, encoder_name) for choice in choices]
    write_rows(_rows_file(unit), rows)
    return {
        "file": f"coords/{name}.h5",
        "patches": len(rows),
        "damaged": found.num_damaged,
        "incomplete": [DAMAGED] if found.num_damaged else [],
        "notes": [_CACHED] if found.reused else [],
    }


def _write_coords(
    unit: _SelectionUnit, found: TileEmbeddings, choices: list[Choice], encoder: str
) -> None:
    folder = unit.out / "coords"
    folder.mkdir(exist_ok=True)
    order = np.sort([choice.index for choice in choices])
    write_features(
        folder / f"{unit.slide_id}.h5",
        found.features[order],
        found.coords[order],
        encoder=encoder,
        attributes=read_attributes(unit.coords),
    )


def _write_geojson(
    unit: _SelectionUnit, size_level0: int, found: TileEmbeddings, choices: list[Choice]
) -> None:
    patches = square_features(
        found.coords[[choice.index for choice in choices]],
        size_level0,
        unit.slide_id,
        object_type="annotation",
        classes=[choice.source for choice in choices],
        colours=SOURCE_COLOURS,
        measurements={
            "score": np.array([choice.score for choice in choices]),
            "cluster": np.array([choice.cluster for choice in choices]),
        },
        labels=[choice.label or choice.text for choice in choices],
    )
    write_geojson(unit.out / "geojson" / f"{unit.slide_id}.geojson", patches)


def _row(
    unit: _SelectionUnit,
    choice: Choice,
    coordinates: Coordinates,
    found: TileEmbeddings,
    encoder: str,
) -> dict[str, Any]:
    x, y = found.coords[choice.index].tolist()
    matched = {"label": choice.label, "text": choice.text} if choice.text else {}
    return {
        "id": f"{unit.slide_id}_{x}_{y}",
        "wsi_id": unit.slide_id,
        "position": [str(x), str(y)],
        "size_level0": coordinates.size_level0,
        "mpp": coordinates.mpp,
        "chosen_for": choice.source,
        "cluster": choice.cluster,
        "score": round(choice.score, 5),
        **matched,
        **({"report": unit.report} if unit.report is not None else {}),
        "encoder": encoder,
    }
