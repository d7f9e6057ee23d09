"""Reads and writes regions of a slide as GeoJSON, the exchange format of QuPath and TRIDENT.

All coordinates are level-0 pixels with the origin at the top left of the slide. Files are
`FeatureCollection`s in the form that QuPath 0.4 and later export
(https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html): ids are UUIDs,
`properties` hold `objectType`, `classification` with name and colour, and numeric `measurements`.
TRIDENT reads tissue contours by GeoPandas; its property `tissue_id` is written too.
"""

from __future__ import annotations

import gzip
import json
import math
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import shapely
import shapely.geometry
from numpy.typing import NDArray

from pathcore.files import StrPath, atomic_file
from pathcore.rows import encode_row

if TYPE_CHECKING:
    from wsi.tissue import TissueMask

GEOJSON_SUFFIXES = tuple(f"{s}{c}" for s in (".geojson", ".json") for c in ("", ".gz", ".zip"))
"""Names of files that QuPath exports."""

ObjectType = Literal["annotation", "detection", "tile"]
"""QuPath's kinds of objects: annotations are edited by hand, tiles carry measurements."""

Colour = tuple[int, int, int]

TISSUE_COLOUR: Colour = (0, 110, 60)
_SIMPLIFY_PX = 0.75
"""How far a contour may leave the edge of the tissue, in pixels of the mask. It removes the stairs
of the pixels, and with them most of the vertices."""

_NAMESPACE = uuid.UUID("5f3c1a52-55d5-4f0e-9d3b-6a6c5a8a1d7e")
_IGNORED_SUFFIX = "*"


def tissue_features(mask: TissueMask, name: str) -> Iterator[dict[str, Any]]:
    """Yields the outlines of the tissue as annotations, largest first, with their holes.

    Args:
        mask: Tissue of the slide.
        name: Id of the slide, from which the ids of the features are derived.
    """
    from skimage.measure import find_contours

    # The frame closes outlines at the edge of the slide. A contour at half height runs along the
    # borders between pixels.
    padded = np.pad(mask.mask, 1).astype(np.float32)
    scale = np.array(mask.slide_size) / np.array(mask.mask.shape[::-1])
    rings = [shapely.linearrings((line[:, ::-1] - 0.5) * scale) for line in find_contours(padded)]
    # Every ring lies directly in a ring of the other kind, so areas and holes alternate.
    areas = shapely.get_parts(shapely.build_area(shapely.geometrycollections(rings)))
    areas = shapely.simplify(areas, _SIMPLIFY_PX * float(scale.min()), preserve_topology=True)
    for number, area in enumerate(sorted(areas, key=lambda a: -a.area)):
        yield _feature(
            shapely.geometry.mapping(shapely.set_precision(area, 0.01)),
            f"{name}/tissue/{number}",
            "annotation",
            classification=("Tissue", TISSUE_COLOUR),
            measurements={"area_level0_px": float(area.area)},
            tissue_id=number,
        )


def square_features(
    coords: NDArray[np.int64],
    size_level0: int,
    name: str,
    *,
    object_type: ObjectType = "tile",
    classes: Sequence[str] | None = None,
    colours: Mapping[str, Colour] | None = None,
    measurements: Mapping[str, NDArray[Any]] | None = None,
    labels: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one square per patch.

    Args:
        coords: int64 `(N, 2)`, left and top in level-0 pixels.
        size_level0: Side of the squares in level-0 pixels.
        name: Id of the slide, from which the ids of the features are derived.
        object_type: QuPath's kind of object.
        classes: Class of each square; by default they have none.
        colours: Colour of every class.
        measurements: Numbers `(N,)` by name; those that are not finite are skipped.
        labels: Name of each square, shown by QuPath.

    Example:
        >>> square = next(square_features(np.array([[256, 0]]), 256, "slide"))
        >>> square["geometry"]["coordinates"]
        [[[256, 0], [512, 0], [512, 256], [256, 256], [256, 0]]]
    """
    columns = {key: np.asarray(values, np.float64) for key, values in (measurements or {}).items()}
    for number, (left, top) in enumerate(coords.tolist()):
        right, bottom = left + size_level0, top + size_level0
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        kind = classes[number] if classes is not None else None
        yield _feature(
            {"type": "Polygon", "coordinates": [ring]},
            f"{name}/{object_type}/{left},{top},{size_level0}",
            object_type,
            classification=None if kind is None else (kind, (colours or {})[kind]),
            measurements={key: float(column[number]) for key, column in columns.items()},
            label=labels[number] if labels is not None else "",
        )


def write_geojson(path: StrPath, features: Iterable[Mapping[str, Any]]) -> None:
    """Writes features as a FeatureCollection atomically, one feature per line."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write((b",\n" if number else b"\n") + encode_row(feature).rstrip(b"\n"))
        file.write(b"\n]}\n")


def read_areas(path: StrPath) -> list[shapely.Polygon]:
    """Reads the regions of a file as disjoint polygons, which may have holes.

    Takes a FeatureCollection, an array, one feature or one geometry, plain or in `.gz` or `.zip`.
    If the file contains annotations, QuPath's other objects (tiles, detections, cells) do not
    count. Regions of a class whose name ends with `*`, which QuPath ignores in analyses
    (`Ignore*`), are cut out.

    Returns:
        The polygons; none if the file contains no features.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not GeoJSON, or its features contain no polygon.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"outlines {path}: no such file")
    try:
        found = list(_features(json.loads(_read_bytes(path))))
        others = [f for f in found if _object_type(f) not in ("annotation", "tmaCore")]
        counted = [f for f in found if f not in others] if len(others) < len(found) else found
        regions: tuple[list[Any], list[Any]] = [], []
        for feature in counted:
            region = shapely.make_valid(shapely.geometry.shape(feature["geometry"]))
            regions[_class_name(feature).endswith(_IGNORED_SUFFIX)].append(region)
    except (
        *(ValueError, TypeError, KeyError, AttributeError, IndexError, OSError, EOFError),
        *(shapely.errors.ShapelyError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise ValueError(f"outlines {path}: no GeoJSON of polygons: {error!r}") from error
    if not found:
        return []
    union = shapely.union_all(_polygons(regions[0]))
    polygons = _polygons([shapely.difference(union, shapely.union_all(_polygons(regions[1])))])
    if not polygons and not _polygons(regions[0]):
        raise ValueError(f"outlines {path}: no polygon in it")
    return polygons


def _feature(
    geometry: Mapping[str, Any],
    key: str,
    object_type: ObjectType,
    *,
    classification: tuple[str, Colour] | None,
    measurements: Mapping[str, float],
    label: str = "",
    **properties: Any,
) -> dict[str, Any]:
    # Ids are derived from the content, so that a repeated run writes the same bytes.
    written: dict[str, Any] = {"objectType": object_type, **properties}
    if label:
        written["name"] = label
    if classification is not None:
        class_name, colour = classification
        written["classification"] = {"name": class_name, "color": list(colour)}
    finite = {name: value for name, value in measurements.items() if math.isfinite(value)}
    if finite:
        written["measurements"] = finite
    written["isLocked"] = object_type != "annotation"
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, key)),
        "geometry": geometry,
        "properties": written,
    }


def _read_bytes(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith((".json", ".geojson"))]
        if len(names) != 1:
            raise ValueError(f"expected one GeoJSON file in the archive, found {len(names)}")
        return archive.read(names[0])


def _features(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from _features(item)
    elif value["type"] == "FeatureCollection":
        yield from _features(value["features"])
    elif value["type"] == "Feature":
        yield value
    else:
        yield {"type": "Feature", "geometry": value}


def _object_type(feature: Mapping[str, Any]) -> str:
    properties = feature.get("properties") or {}
    found = properties.get("objectType") or properties.get("object_type") or "annotation"
    return str(found)


def _class_name(feature: Mapping[str, Any]) -> str:
    """Returns the class of a feature; LazySlide writes it as a string of JSON."""
    found = (feature.get("properties") or {}).get("classification") or ""
    if isinstance(found, str) and found.startswith("{"):
        found = json.loads(found)
    if isinstance(found, dict):
        found = found.get("name") or ": ".join(found.get("names") or ())
    return str(found)


def _polygons(shapes: Sequence[Any]) -> list[shapely.Polygon]:
    parts = shapely.get_parts(shapely.get_parts(np.array(shapes, dtype=object)))
    return [part for part in parts if part.geom_type == "Polygon" and not part.is_empty]
