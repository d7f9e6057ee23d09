"""Vectors of slides or patients from patch features that are there already, in a resumable job.

`OUT/` gets `slide_features/ENCODER/SLIDE.h5` and `slide_embeddings.npz`, or the same of patients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from gigapath.embed.job import write_table
from gigapath.embed.slide_encoders import (
    NamedSlideEncoder,
    OriginError,
    check_origin,
    complete_origin,
    get_slide_preset,
    origin_of_file,
)
from gigapath.embed.slide_vectors import write_slide_vector
from gigapath.finetune.bags import SlideFolder
from pathcore.device_claims import choose_device
from pathcore.encoders.origin import TileOrigin
from pathcore.files import StrPath, UnsafeNameError
from pathcore.jobs import JobFolder, Report, UnitError
from pathcore.rows import read_csv
from wsi.conform import read_feature_file
from wsi.features import EmbeddingError, check_features
from wsi.slide_job import SlideUnit, forget_changed, process_units

SLIDE_COLUMNS = ("slide", "slide_id")
PATIENT_COLUMNS = ("patient", "patient_id", "pat_id", "case_id")

_SLIDE_SKIPPED = "slide of the patient skipped"


@dataclass(frozen=True)
class Bag:
    """Patch features of a slide, or of all slides of a patient.

    Attributes:
        features: `(N, dim)`.
        coords: int64 `(N, 2)`: left and top in level-0 pixels.
        size_level0: Side of a patch in level-0 pixels.
        origin: Where the features come from.
    """

    features: NDArray[Any]
    coords: NDArray[np.int64]
    size_level0: int
    origin: TileOrigin


def encode_slides(
    features: StrPath,
    out: StrPath,
    encoder: NamedSlideEncoder,
    *,
    stated: TileOrigin | None = None,
    patients: StrPath | None = None,
    device: str | None = None,
    retry_skipped: bool = False,
    progress: bool = True,
) -> Report:
    """Embeds the slides of a folder of features, or their patients.

    A slide that cannot be used is recorded and skipped; its patient is embedded without it, and is
    recorded as incomplete. What is done is embedded again if a file of features changed.

    Args:
        features: Folder of `SLIDE.h5`, of this package, TRIDENT, CLAM or STAMP.
        out: Folder to write; a job that was stopped continues in it.
        encoder: The slide encoder.
        stated: What the features are, where the files do not say it; recorded with every vector.
        patients: CSV with columns `slide` and `patient`; by default one vector per slide.
        device: Name of the device; by default a GPU if there is one.
        retry_skipped: Whether to process again what an earlier run skipped.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If `features` holds no `.h5`.
        ValueError: If the table of patients is not usable.
        OutputExistsError: If `out` holds something else.
        FolderInUseError: If another run is writing to `out`.
    """
    folder = SlideFolder(Path(features))
    names = [path.stem for path in sorted(folder.path.glob("[!.]*.h5"))]
    if not names:
        raise FileNotFoundError(f"features {features}: no .h5 in this folder")
    noun = "slide" if patients is None else "patient"
    members = {name: [name] for name in names} if patients is None else read_patients(patients)
    stated, common = stated or TileOrigin(), _most_common_encoder(folder, names)
    inputs = {
        "operation": "encode",
        "features": str(folder.path.resolve()),
        "encoder": asdict(encoder),
        "stated": asdict(stated),
        "patients": None if patients is None else members,
    }
    process = partial(
        _encode_unit,
        members=members,
        encoder=encoder,
        stated=stated,
        common=common,
        noun=noun,
        device=str(choose_device(device)),
    )
    listed = {slide for slides in members.values() for slide in slides}
    with JobFolder(out, inputs, retry_skipped=retry_skipped) as job:
        units = [SlideUnit(name, folder.path, job.out) for name in members]
        source = partial(_source, members=members)
        forget_changed(job, units, source, noun=noun)
        process_units(
            process,
            units,
            job,
            num_inputs=len(members),
            noun=noun,
            source=source,
            progress=progress,
        )
        write_table(job, noun)
        others = sorted(set(names) - listed)
        reason = "slide is not in the table of patients"
        return job.finish(passed_over=[{"file": f"{n}.h5", "reason": reason} for n in others])


def read_patients(path: StrPath) -> dict[str, list[str]]:
    """Reads which slides a patient has.

    Args:
        path: CSV with one of `SLIDE_COLUMNS` and one of `PATIENT_COLUMNS`.

    Returns:
        Slides by patient, in the order of the table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column, value or row is missing, or a slide has two patients.
    """
    patients: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for line, row in read_csv(path, what="patients"):
        chosen = [
            next((name for name in names if name in row), "")
            for names in (SLIDE_COLUMNS, PATIENT_COLUMNS)
        ]
        if not all(chosen):
            raise ValueError(
                f"{path}: columns {', '.join(filter(None, row))}; expected slide (or slide_id) and "
                "patient (or patient_id, pat_id, case_id)"
            )
        slide, patient = (str(row[name] or "").strip() for name in chosen)
        if not slide or not patient:
            raise ValueError(f"{path}, line {line}: slide or patient is empty")
        slide = slide.removesuffix(".h5").removesuffix(".svs")
        if owner.setdefault(slide, patient) != patient:
            raise ValueError(f"{path}: slide {slide} has patients {owner[slide]} and {patient}")
        slides = patients.setdefault(patient, [])
        if slide not in slides:
            slides.append(slide)
    if not patients:
        raise ValueError(f"{path}: no rows; expected one for each slide")
    return patients


def _most_common_encoder(folder: SlideFolder, names: Sequence[str]) -> tuple[str, int]:
    """Returns name and digest of the encoder of most files, and the width of its features.

    Vectors of two encoders' features do not go together, whatever the slide encoder takes.
    """
    counts: Counter[tuple[str, int]] = Counter()
    for name in names:
        try:
            with h5py.File(folder.file(name), "r") as file:
                width = file["features" if "features" in file else "feats"].shape[-1]
            counts[folder.encoder(name), width] += 1
        except (OSError, KeyError, ValueError, AttributeError):
            continue  # a damaged file is recorded when its turn comes
    return counts.most_common(1)[0][0] if counts else ("", 0)


def read_bag(path: Path, encoder: NamedSlideEncoder, stated: TileOrigin) -> Bag:
    """Reads the features of a slide and checks that the encoder was trained on such.

    Raises:
        ValueError: If the file is damaged.
        OriginError: If the features are not what the encoder was trained on.
        EmbeddingError: If they are not finite, or their coordinates are missing but needed.
    """
    file, preset = read_feature_file(path), get_slide_preset(encoder.preset)
    origin = complete_origin(origin_of_file(file), stated, str(path))
    check_origin(preset, origin, str(path))
    coords = file.coords
    if preset.patients == "side by side":  # positions matter
        if coords is None or file.unit != "px" or not file.patch_level0_px:
            raise EmbeddingError(
                f"{path}: slide encoder {preset.name} needs coordinates in level-0 pixels and the "
                "size of a patch at level 0; convert the file by `xtuner-add conform`"
            )
        if not (coords == np.round(coords)).all():
            raise EmbeddingError(f"{path}: coordinates are not whole pixels")
    elif coords is None or len(coords) != len(file.features):
        coords = np.zeros((len(file.features), 2))
    whole = coords.astype(np.int64)
    check_features(file.features, whole, str(path))
    return Bag(file.features, whole, round(file.patch_level0_px or 0), origin)


def join_bags(bags: Sequence[Bag], *, side_by_side: bool) -> Bag:
    """Makes one bag of the slides of a patient.

    Args:
        bags: One per slide.
        side_by_side: Whether slides are shifted along x, each to the right of the last, as STAMP
            does for TITAN and Prov-GigaPath. Slides that were scanned at another resolution are
            scaled to the finest, so that patches keep one size. Otherwise coordinates are kept.

    Raises:
        OriginError: If the slides' features come from different encoders.
    """
    first = bags[0].origin
    for bag in bags[1:]:
        if (bag.origin.encoder, bag.origin.digest) != (first.encoder, first.digest):
            raise OriginError(
                f"features of {first.encoder} {first.digest[:12]} and of {bag.origin.encoder} "
                f"{bag.origin.digest[:12]} in one patient"
            )
    size = max(bag.size_level0 for bag in bags)
    coords, offset = [], 0
    for bag in bags:
        places = bag.coords
        if side_by_side:
            # Multiplied first, so that nothing is lost to rounding.
            places = places * size // bag.size_level0 + np.array([offset, 0])
            offset = int(places[:, 0].max()) + size
        coords.append(places)
    return Bag(np.concatenate([bag.features for bag in bags]), np.concatenate(coords), size, first)


def _source(unit: SlideUnit, members: Mapping[str, Sequence[str]]) -> list[Any] | None:
    """Returns the identity of the files of a unit, None for a missing one; None if all are."""
    folder = SlideFolder(unit.path)
    found: list[Any] = []
    for slide in members[unit.slide_id]:
        try:
            found += folder.identity(slide)
        except (OSError, UnsafeNameError):
            found.append(None)
    return found if any(found) else None


def _encode_unit(
    unit: SlideUnit,
    members: Mapping[str, Sequence[str]],
    encoder: NamedSlideEncoder,
    stated: TileOrigin,
    common: tuple[str, int],
    noun: str,
    device: str,
) -> dict[str, Any]:
    folder, preset = SlideFolder(unit.path), get_slide_preset(encoder.preset)
    bags: dict[str, Bag] = {}
    faults: dict[str, str] = {}
    for slide in members[unit.slide_id]:
        try:
            path = folder.file(slide)
            most, width = common
            if (own := folder.encoder(slide)) != most:
                raise OriginError(
                    f"{path}: features of {own or 'an unknown encoder'}, those of most slides are "
                    f"of {most or 'an unknown encoder'}"
                )
            bag = read_bag(path, encoder, stated)
            if bag.features.shape[1] != width:
                raise OriginError(
                    f"{path}: features of width {bag.features.shape[1]}, those of most slides have "
                    f"width {width}"
                )
            bags[slide] = bag
        except UnitError as error:
            if noun == "slide":
                raise
            faults[slide] = str(error)
        except (OSError, ValueError) as error:  # h5py raises OSError for a damaged file
            if noun == "slide":
                raise EmbeddingError(str(error)) from error
            faults[slide] = str(error)
    if not bags:
        raise OriginError(f"{unit.slide_id}: no usable slide: {'; '.join(faults.values())}")
    side_by_side = preset.patients == "side by side"
    bag = join_bags(list(bags.values()), side_by_side=side_by_side)
    encoder.check(bag.coords, bag.size_level0, unit.slide_id)
    network = _open_slide_encoder(encoder, device)
    vector = encoder.vector(network, bag.features, bag.coords, bag.size_level0, unit.slide_id)
    path_in_job = f"{noun}_features/{encoder.folder}/{unit.slide_id}.h5"
    origin = replace(bag.origin, stated=())
    attributes = {
        **encoder.attributes(bag.size_level0),
        "name": unit.slide_id,
        "num_tiles": len(bag.features),
        "size_level0": bag.size_level0,
        "tile_encoder": origin.encoder,
        "tile_encoder_sha256": origin.digest,
        "features_origin": str(origin),
        "stated": ", ".join(bag.origin.stated),
    }
    row: dict[str, Any] = {f"{noun}_features": path_in_job, "tiles": len(bag.features)}
    if noun == "patient":
        attributes |= {"slides": list(bags), "slides_are": preset.patients}
        row |= {"slides": list(bags), "skipped_slides": faults}
        row["incomplete"] = [_SLIDE_SKIPPED] if faults else []
    if bag.origin.stated:
        row["stated"] = list(bag.origin.stated)
    write_slide_vector(unit.out / path_in_job, vector, attributes)
    return row


@lru_cache(maxsize=1)
def _open_slide_encoder(encoder: NamedSlideEncoder, device: str) -> Any:
    return encoder.open(torch.device(device))
