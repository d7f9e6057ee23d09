"""Selects representative patches of many slides.

Writes into one folder:

    features/<encoder>/<slide>.h5   features of all patches, reused by later runs
    coords/<slide>.h5               selected patches, for `xtuner-add extract`
    pictures/<slide>.jpg            clusters and selected patches on the slide
    geojson/<slide>.geojson         selected patches for QuPath, on request
    selection.jsonl                 one row per selected patch, with the reason
    selection.skipped.jsonl         slides and patches that were skipped, and why
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pathcore.encoders import Encoder
from pathcore.files import StrPath, check_name
from pathcore.rows import encode_row, row_files
from pathgen.selection.features import slide_features
from pathgen.selection.picture import SOURCE_COLOURS, draw_selection
from pathgen.selection.sampling import (
    FRACTIONS,
    Choice,
    Source,
    Texts,
    load_classes,
    select,
    split_report,
)
from wsi.features import TileEmbeddings
from wsi.geojson import square_features, write_geojson
from wsi.reader import Slide
from wsi.report import save_jpeg
from wsi.slide_listing import PassedOver, SlideListing
from wsi.store import Coordinates, read_attributes, read_coordinates, write_features

SKIPPED_NAME = "selection.skipped.jsonl"


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


@dataclass
class SelectionReport:
    """Outcome of a selection.

    Attributes:
        num_slides: Number of slides that have coordinates.
        num_patches: Number of patches selected.
        num_reused: Number of slides whose features an earlier run had computed.
        skipped: For each slide that was skipped, why.
        damaged: For each slide with patches that could not be read, how many.
        passed_over: Files in the folder of slides that are not slides.
    """

    num_slides: int = 0
    num_patches: int = 0
    num_reused: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)
    passed_over: list[PassedOver] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every patch of every slide was considered."""
        return not (self.skipped or self.damaged)


def select_patches(
    coords: StrPath,
    slides: StrPath,
    output: StrPath,
    encoder: Encoder,
    settings: SelectionSettings | None = None,
    *,
    cancer_types: Mapping[str, str] | None = None,
    reports: Mapping[str, str] | None = None,
    progress: bool = True,
) -> SelectionReport:
    """Selects patches of every slide that has a coordinates file.

    Args:
        coords: Folder of coordinates files, `<slide>.h5` or `<slide>_patches.h5`.
        slides: Folder of the slides.
        output: Output folder; the docstring of this module lists its files.
        encoder: Image-text encoder.
        settings: How patches are selected.
        cancer_types: Slide -> TCGA code.
        reports: Slide -> text of its report.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If there are no coordinates, or the folder of slides is missing.
        ValueError: If a cancer type has no descriptions, or the settings are invalid.
    """
    settings = settings or SelectionSettings()
    output = Path(output)
    files = sorted(p for p in Path(coords).glob("*.h5") if not p.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"coordinates {coords}: no .h5 files")
    listing = SlideListing(slides, exclude=[output, coords])
    job = _Job(output, encoder, settings, cancer_types or {}, reports or {})
    report = SelectionReport(passed_over=listing.passed_over)
    names = (output / "selection.jsonl", output / SKIPPED_NAME)
    with row_files(*names) as (rows_file, skipped_file):
        for file in tqdm(files, desc="slides", unit="slide", disable=not progress):
            name = file.stem.removesuffix("_patches")
            report.num_slides += 1
            try:
                path = listing.find(check_name(name))
                rows, found = job.select(name, file, path)
            except (ValueError, OSError) as error:
                report.skipped[name] = str(error)
                skipped_file.write(encode_row({"wsi_id": name, "reason": str(error)}))
                continue
            report.num_reused += found.reused
            report.num_patches += len(rows)
            if found.num_damaged:
                report.damaged[name] = found.num_damaged
                reason = f"{found.num_damaged} patches cannot be read"
                skipped_file.write(encode_row({"wsi_id": name, "reason": reason}))
            for row in rows:
                rows_file.write(encode_row(row))
    return report


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


class _Job:
    def __init__(
        self,
        output: Path,
        encoder: Encoder,
        settings: SelectionSettings,
        cancer_types: Mapping[str, str],
        reports: Mapping[str, str],
    ) -> None:
        self._output = output
        self._encoder = encoder
        self._settings = settings
        self._types = cancer_types
        self._reports = reports
        wanted = {settings.cancer_type, *cancer_types.values()}
        self._prompts = {kind: self._descriptions(kind) for kind in wanted}

    def select(
        self, name: str, coords_path: Path, slide_path: Path
    ) -> tuple[list[dict[str, Any]], TileEmbeddings]:
        """Returns the rows of one slide's selected patches; writes coordinates and picture."""
        settings, coordinates = self._settings, read_coordinates(coords_path)
        found = slide_features(
            slide_path,
            coords_path,
            self._encoder,
            self._output / "features",
            batch_size=settings.batch_size,
        )
        choices, labels = select(
            found.features,
            settings.quota,
            prompts=self._prompts[self._types.get(name, settings.cancer_type)],
            report=self._sentences(name),
            fractions=settings.fractions,
            clusters=settings.clusters,
            max_similarity=settings.max_similarity,
            seed=settings.seed,
        )
        indices = np.array([choice.index for choice in choices], np.int64)
        self._write_coords(name, coords_path, found, indices)
        if settings.geojson:
            self._write_geojson(name, coordinates.size_level0, found, choices)
        if settings.pictures:
            self._draw(name, slide_path, coordinates, found, labels, choices)
        rows = [self._row(name, choice, coordinates, found) for choice in choices]
        return rows, found

    def _descriptions(self, cancer_type: str | None) -> Texts:
        pairs = load_classes(cancer_type, self._settings.classes)
        labels, texts = [label for label, _ in pairs], [text for _, text in pairs]
        return Texts(texts, labels, self._encoder.encode_texts(texts).numpy())

    def _sentences(self, name: str) -> Texts | None:
        sentences = split_report(self._reports.get(name, ""))
        if not sentences:
            return None
        features = self._encoder.encode_texts(sentences).numpy()
        return Texts(sentences, [""] * len(sentences), features)

    def _write_coords(
        self, name: str, source: Path, found: TileEmbeddings, indices: np.ndarray
    ) -> None:
        folder = self._output / "coords"
        folder.mkdir(parents=True, exist_ok=True)
        order = np.sort(indices)
        write_features(
            folder / f"{name}.h5",
            found.features[order],
            found.coords[order],
            encoder=self._encoder.folder_name,
            attributes=read_attributes(source),
        )

    def _write_geojson(
        self, name: str, size_level0: int, found: TileEmbeddings, choices: list[Choice]
    ) -> None:
        patches = square_features(
            found.coords[[choice.index for choice in choices]],
            size_level0,
            name,
            object_type="annotation",
            classes=[choice.source for choice in choices],
            colours=SOURCE_COLOURS,
            measurements={
                "score": np.array([choice.score for choice in choices]),
                "cluster": np.array([choice.cluster for choice in choices]),
            },
            labels=[choice.label or choice.text for choice in choices],
        )
        write_geojson(self._output / "geojson" / f"{name}.geojson", patches)

    def _draw(
        self,
        name: str,
        slide_path: Path,
        coordinates: Coordinates,
        found: TileEmbeddings,
        labels: np.ndarray,
        choices: list[Choice],
    ) -> None:
        folder = self._output / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        with Slide(slide_path) as slide:
            picture = draw_selection(slide, found.coords, coordinates.size_level0, labels, choices)
        save_jpeg(picture, folder / f"{name}.jpg")

    def _row(
        self, name: str, choice: Choice, coordinates: Coordinates, found: TileEmbeddings
    ) -> dict[str, Any]:
        x, y = found.coords[choice.index].tolist()
        report = {"report": self._reports[name]} if name in self._reports else {}
        matched = {"label": choice.label, "text": choice.text} if choice.text else {}
        return {
            "id": f"{name}_{x}_{y}",
            "wsi_id": name,
            "position": [str(x), str(y)],
            "size_level0": coordinates.size_level0,
            "mpp": coordinates.mpp,
            "chosen_for": choice.source,
            "cluster": choice.cluster,
            "score": round(choice.score, 5),
            **matched,
            **report,
            "encoder": self._encoder.folder_name,
        }
