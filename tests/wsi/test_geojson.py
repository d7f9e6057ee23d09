"""GeoJSON for QuPath and TRIDENT, and what comes back from them."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import shapely
import shapely.geometry
from scipy.ndimage import gaussian_filter

from tests.wsi.qupath import SCHEMA, read_valid
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.geojson import read_areas, square_features, tissue_features, write_geojson
from wsi.reader import Slide
from wsi.tissue import TissueMask, geojson_mask, otsu_mask

SIZE = 4000, 3000


def blobs() -> TissueMask:
    """Tissue with holes, islands in holes and parts at the edge, at a tenth of the resolution."""
    noise = np.random.default_rng(3).normal(size=(300, 400))
    return TissueMask(gaussian_filter(noise, 9) > 0, SIZE)


def square(x0: int, y0: int, x1: int, y1: int) -> dict[str, Any]:
    return dict(shapely.geometry.mapping(shapely.box(x0, y0, x1, y1)))


def feature(geometry: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def area(path: Path) -> float:
    return float(sum(polygon.area for polygon in read_areas(path)))


def test_tissue_has_holes_and_comes_back_as_it_was(tmp_path: Path) -> None:
    mask, path = blobs(), tmp_path / "s.geojson"
    write_geojson(path, tissue_features(mask, "s"))
    features = read_valid(path)
    shapes = [shapely.geometry.shape(f["geometry"]) for f in features]
    assert any(shape.interiors for shape in shapes)
    sizes = [f["properties"]["measurements"]["area_level0_px"] for f in features]
    assert sizes == sorted(sizes, reverse=True)
    assert [f["properties"]["tissue_id"] for f in features] == list(range(len(features)))
    assert sum(sizes) == pytest.approx(mask.fraction * SIZE[0] * SIZE[1], rel=0.01)
    # Every pixel of the mask that is not at an edge lies on its side of the outlines.
    union = shapely.union_all(shapes)
    shapely.prepare(union)
    y, x = np.mgrid[:300, :400]
    inside = shapely.contains_xy(union, (x + 0.5) * 10, (y + 0.5) * 10)
    away = shapely.distance(union.boundary, shapely.points((x + 0.5) * 10, (y + 0.5) * 10)) > 10
    assert np.array_equal(inside[away], mask.mask[away]) and away.mean() > 0.7
    before = path.read_bytes()
    write_geojson(path, tissue_features(mask, "s"))
    assert path.read_bytes() == before


def test_outlines_of_a_slide_give_its_mask(tmp_path: Path) -> None:
    write_svs(tmp_path / "s.svs", tissue_pixels(1600, 1100, blank=0.5))
    with Slide(tmp_path / "s.svs") as slide:
        mask = otsu_mask(slide)
        write_geojson(tmp_path / "s.geojson", tissue_features(mask, "s"))
        again = geojson_mask(tmp_path / "s.geojson", slide)
        nothing = TissueMask(np.zeros_like(mask.mask), slide.dimensions)
        write_geojson(tmp_path / "none.geojson", tissue_features(nothing, "s"))
        assert geojson_mask(tmp_path / "none.geojson", slide).fraction == 0
    write_svs(tmp_path / "small.svs", tissue_pixels(800, 550))  # scanned at half the resolution
    with (
        Slide(tmp_path / "small.svs") as slide,
        pytest.raises(ValueError, match="outlines lie outside the slide of 800 x 550 px"),
    ):
        geojson_mask(tmp_path / "s.geojson", slide)
    assert (mask.mask & again.mask).sum() / (mask.mask | again.mask).sum() > 0.95


def test_squares_with_classes_and_measurements(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [512, 256], [0, 256]])
    write_geojson(
        tmp_path / "s.geojson",
        square_features(
            coords,
            256,
            "s",
            classes=["tumour", "stroma", "tumour"],
            colours={"tumour": (200, 0, 0), "stroma": (0, 150, 0)},
            measurements={"attention": np.array([0.25, np.nan, 1e-9], np.float32)},
            labels=["first", "", "thïrd"],
        ),
    )
    first, second, third = read_valid(tmp_path / "s.geojson")
    assert shapely.geometry.shape(second["geometry"]).bounds == (512, 256, 768, 512)
    assert first["properties"] == {
        "objectType": "tile",
        "name": "first",
        "classification": {"name": "tumour", "color": [200, 0, 0]},
        "measurements": {"attention": 0.25},
        "isLocked": True,
    }
    assert "measurements" not in second["properties"] and "name" not in second["properties"]
    assert third["properties"]["measurements"]["attention"] == pytest.approx(1e-9)
    write_geojson(tmp_path / "none.geojson", [])
    assert read_valid(tmp_path / "none.geojson") == []


def test_the_schema_refuses_what_qupath_refuses() -> None:
    [good] = square_features(np.array([[0, 0]]), 8, "s", classes=["a"], colours={"a": (1, 2, 3)})
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate({"type": "FeatureCollection", "features": [good]})
    for key, value in (("classification", {"name": "a"}), ("measurements", {"a": "0.5"})):
        bad = {**good, "properties": {**good["properties"], key: value}}
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({"type": "FeatureCollection", "features": [bad]})


def test_every_form_that_qupath_exports(tmp_path: Path) -> None:
    inner, outer = square(20, 20, 40, 40), square(0, 0, 100, 100)
    holed = {"type": "Polygon", "coordinates": [*outer["coordinates"], *inner["coordinates"]]}
    parts = [holed["coordinates"], square(200, 0, 210, 10)["coordinates"]]
    many = {"type": "MultiPolygon", "coordinates": parts}
    one = feature(holed, objectType="annotation", classification={"names": ["Tissue", "a"]})
    forms: dict[str, tuple[Any, float]] = {
        "collection": ({"type": "FeatureCollection", "features": [one]}, 9600),
        "array": ([one, feature(square(100, 0, 110, 10))], 9700),
        "feature": (one, 9600),
        "geometry": (many, 9700),
        "geometries": ({"type": "GeometryCollection", "geometries": [many, inner]}, 10100),
        "overlap": ([feature(outer), feature(square(50, 0, 150, 100))], 15000),
        "lazyslide": (
            [feature(outer, classification=json.dumps({"name": "Tissue", "color": [1, 2, 3]}))],
            10000,
        ),
        "ignored": ([feature(outer), feature(inner, classification={"name": "Ignore*"})], 9600),
        "all ignored": ([feature(inner, classification="Ignore*")], None),
        "tiles": ([feature(inner), feature(outer, objectType="tile")], 400),
        "only tiles": ([feature(outer, objectType="tile")], 10000),
        "old": ([{**one, "id": "PathAnnotationObject"}], 9600),
        "empty": ({"type": "FeatureCollection", "features": []}, 0),
    }  # fmt: skip
    for name, (value, expected) in forms.items():
        path = tmp_path / f"{name}.geojson"
        path.write_text(json.dumps(value))
        if expected is None:
            with pytest.raises(ValueError, match="no polygon"):
                read_areas(path)
            continue
        assert area(path) == pytest.approx(expected), name
        (tmp_path / "packed.geojson.gz").write_bytes(gzip.compress(path.read_bytes()))
        assert area(tmp_path / "packed.geojson.gz") == pytest.approx(expected)
        with zipfile.ZipFile(tmp_path / "packed.geojson.zip", "w") as archive:
            archive.write(path, "objects.geojson")
        assert area(tmp_path / "packed.geojson.zip") == pytest.approx(expected)


@pytest.mark.parametrize("name", ["s.geojson", "s.geojson.gz", "s.geojson.zip"])
@pytest.mark.parametrize("content", [b"", b"{", b'{"type": "Feature"}', b"[1]", b'"text"',
                                     b'{"type": "Point", "coordinates": [1, 2]}'])  # fmt: skip
def test_what_is_no_geojson_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    with pytest.raises(ValueError, match=rf"{name}: no "):
        read_areas(tmp_path / name)


def test_two_files_in_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("a.geojson", "[]")
        archive.writestr("b.geojson", "[]")
    with pytest.raises(ValueError, match="one GeoJSON file in the archive, found 2"):
        read_areas(tmp_path / "s.zip")
