"""Coordinate files, read as TRIDENT and CLAM read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import Region, Slide
from wsi.requests import PatchRequest, RejectedRow, read_coordinate_folder
from wsi.store import (
    read_attributes,
    read_coordinates,
    read_features,
    write_coordinates,
    write_features,
)
from wsi.tiling import PatchSpec, tile


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "TCGA.00.svs"
    return write_svs(path, tissue_pixels(1600, 1100), mpp=0.252, downsamples=(4,))


def trident_patches(path: Path, slide: Slide) -> list[tuple[int, int, int]]:
    """What TRIDENT reads: left, top and side at level 0, from magnifications (WSIPatcher)."""
    with h5py.File(path) as file:
        coords, attributes = file["coords"][:], dict(file["coords"].attrs)
    scale = (10 / attributes["target_magnification"]) / (10 / attributes["level0_magnification"])
    side = round(attributes["patch_size"] * scale)
    assert attributes["patch_size_level0"] == side
    assert attributes["name"] == slide.path.stem
    assert coords.dtype == np.int64
    return [(x, y, side) for x, y in coords.tolist()]


def clam_patches(path: Path, slide: Slide) -> list[tuple[int, int, int]]:
    """What CLAM reads: `read_region(coord, patch_level, (patch_size, patch_size))`."""
    with h5py.File(path) as file:
        coords, attributes = file["coords"][:], file["coords"].attrs
        side = attributes["patch_size"] * slide.level_downsamples[attributes["patch_level"]]
        assert tuple(attributes["level_dim"]) == slide.level_dimensions[attributes["patch_level"]]
        return [(x, y, int(side)) for x, y in coords.tolist()]


@pytest.mark.parametrize("spec", [(256, 0.5), (200, 0.252), (100, 1.008), (224, 0.6)])
def test_trident_and_clam_read_the_same_squares(
    slide_path: Path, tmp_path: Path, spec: tuple[int, float]
) -> None:
    with Slide(slide_path) as slide:
        tiling = tile(slide, PatchSpec(*spec, overlap_px=20))
        expected = [(x, y, tiling.size_level0) for x, y in tiling.coords.tolist()]
        assert expected
        write_coordinates(tmp_path / "a.h5", slide, tiling)
        write_coordinates(tmp_path / "clam.h5", slide, tiling, style="clam")
        assert trident_patches(tmp_path / "a.h5", slide) == expected
        assert clam_patches(tmp_path / "clam.h5", slide) == expected
        with h5py.File(tmp_path / "a.h5") as file:
            has_level = "patch_level" in file["coords"].attrs
        # CLAM must read the right squares or none
        assert has_level == (tiling.size_level0 / spec[0] in slide.level_downsamples)
        if has_level:
            assert clam_patches(tmp_path / "a.h5", slide) == expected
    for name in ("a.h5", "clam.h5"):
        found = read_coordinates(tmp_path / name)
        assert np.array_equal(found.coords, tiling.coords)
        assert (found.name, found.size_level0) == ("TCGA.00", tiling.size_level0)
        assert (found.patch_px, found.mpp) == spec


def write_foreign(path: Path, coords: Any, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=coords).attrs.update(attributes)
    return path


def test_files_of_trident_and_clam_open_here(tmp_path: Path) -> None:
    coords = np.array([[0, 512], [512, 512]])
    trident: dict[str, Any] = dict(patch_size=256, overlap=0, name="s1", savetodir="/x")
    trident |= dict(level0_magnification=40, target_magnification=20)
    found = read_coordinates(write_foreign(tmp_path / "s1_patches.h5", coords, **trident))
    assert (found.name, found.size_level0, found.patch_px) == ("s1", 512, 256)
    old = read_coordinates(
        write_foreign(tmp_path / "o.h5", coords, patch_size_level0=500, **trident)
    )
    assert old.size_level0 == 500
    clam: dict[str, Any] = dict(patch_size=256, patch_level=1, downsample=np.array([4.0, 4.0]))
    found = read_coordinates(write_foreign(tmp_path / "s2.h5", coords.astype(np.int32), **clam))
    assert (found.name, found.size_level0, found.patch_px) == ("s2", 1024, 256)
    empty = write_foreign(tmp_path / "empty.h5", np.array([]), **trident)
    assert read_coordinates(empty).coords.shape == (0, 2)


def test_attributes_of_old_forks(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [512, 0]])
    clam: dict[str, Any] = dict(patch_size=256, patch_level=0, custom_downsample=2)
    found = read_coordinates(write_foreign(tmp_path / "c.h5", coords, **clam))
    assert (found.size_level0, found.patch_px) == (512, 256)  # as TRIDENT reads it
    clam |= dict(patch_level=1, downsample=np.array([4.0, 4.0]))
    assert read_coordinates(write_foreign(tmp_path / "d.h5", coords, **clam)).size_level0 == 2048
    trident: dict[str, Any] = dict(
        patch_size=np.array([256]), level0_magnification=np.array([40]), target_magnification=20,
        mpp=np.array([0.5]), level0_width=np.array([900]), level0_height=700,
    )  # fmt: skip
    found = read_coordinates(write_foreign(tmp_path / "e.h5", coords, **trident))
    assert (found.size_level0, found.patch_px) == (512, 256)
    assert (found.mpp, found.slide_px) == (0.5, (900, 700))
    pair = dict(patch_size=np.array([256, 512]), patch_size_level0=512)
    with pytest.raises(ValueError, match=r"f\.h5: expected attributes .*expected one number"):
        read_coordinates(write_foreign(tmp_path / "f.h5", coords, **pair))


def test_features_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    good, coords = np.ones((3, 4), np.float32), np.arange(6).reshape(3, 2)
    bad = good.copy()
    bad[1, 2] = np.nan
    for name, features, places, message in (
        ("nan", bad, coords, r"1 of 3 rows hold NaN or infinity, the first at \[2, 3\]"),
        ("half", good, coords + 0.5, "whole coordinates"),
        ("lost", good, np.full((3, 2), np.nan), "whole coordinates"),
        ("far", good, np.full((3, 2), np.inf, np.float16), "whole coordinates"),
        ("large", good, np.full((3, 2), 1e30), "whole coordinates"),
        ("text", np.full((3, 4), b"x"), coords, "expected numbers"),
    ):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=features)
            file.create_dataset("coords", data=places)
        with pytest.raises(ValueError, match=rf"{name}\.h5: .*{message}"):
            read_features(tmp_path / f"{name}.h5")
    with h5py.File(tmp_path / "float.h5", "w") as file:
        file["features"], file["coords"] = good[None], coords.astype(np.float64)
    assert read_features(tmp_path / "float.h5")[1].tolist() == coords.tolist()


def test_files_that_do_not_say_enough_are_refused(tmp_path: Path) -> None:
    coords = np.array([[0, 0]])
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["features"] = coords
    write_foreign(tmp_path / "bare.h5", coords)
    write_foreign(tmp_path / "level.h5", coords, patch_size=256, patch_level=2)
    write_foreign(tmp_path / "shape.h5", np.zeros((3, 3)), patch_size=256, patch_size_level0=256)
    write_foreign(tmp_path / "half.h5", coords + 0.5, patch_size=256, patch_size_level0=256)
    write_foreign(tmp_path / "zero.h5", coords, patch_size=0, patch_size_level0=0)
    write_foreign(tmp_path / "far.h5", coords - np.inf, patch_size=256, patch_size_level0=256)
    sizes = dict(patch_size=256, patch_size_level0=256)
    write_foreign(tmp_path / "mpp.h5", coords, mpp=np.array([]), **sizes)
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("coords")
    names = ("text", "none", "bare", "level", "shape", "half", "zero", "far", "mpp", "group")
    for name in names:
        with pytest.raises(ValueError, match=f"{name}.h5"):
            read_coordinates(tmp_path / f"{name}.h5")
    for read in (read_coordinates, read_features):
        with pytest.raises(ValueError, match=r"text\.h5: not an HDF5 file"):
            read(tmp_path / "text.h5")
    with pytest.raises(ValueError, match=r"bare\.h5: no dataset 'features' in it"):
        read_features(tmp_path / "bare.h5")
    with pytest.raises(FileNotFoundError):
        read_coordinates(tmp_path / "absent.h5")
    rows = list(read_coordinate_folder(tmp_path))
    assert [row.reason for row in rows if isinstance(row, RejectedRow)] == [
        "bad coordinates file"
    ] * len(names)
    with pytest.raises(FileNotFoundError, match=r"\.h5"):
        next(read_coordinate_folder(tmp_path / "nowhere"))


def test_a_folder_of_coordinates_asks_for_its_patches(slide_path: Path, tmp_path: Path) -> None:
    with Slide(slide_path) as slide:
        tiling = tile(slide, PatchSpec(256, 0.5))
        write_coordinates(tmp_path / "TCGA.00.h5", slide, tiling)
        requests = [r for r in read_coordinate_folder(tmp_path) if isinstance(r, PatchRequest)]
        assert [(r.x_level0, r.y_level0) for r in requests] == list(map(tuple, tiling.coords))
        first = requests[0]
        region = Region(first.x_level0, first.y_level0, first.size_level0, first.size_px)
        pixels = slide.read(region)
        whole = slide.read(Region(0, 0, 508, 508))
    expected = Image.fromarray(whole).resize((256, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels, np.asarray(expected))


def test_features_with_their_coordinates(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float16)
    coords = np.arange(10).reshape(5, 2)
    attributes = {"patch_size": 256, "patch_size_level0": 512}
    write_features(tmp_path / "a.h5", features, coords, encoder="plip", attributes=attributes)
    found, where = read_features(tmp_path / "a.h5")
    assert found.dtype == np.float16
    assert np.array_equal(found, features) and np.array_equal(where, coords)
    assert read_attributes(tmp_path / "a.h5") == attributes
    assert read_coordinates(tmp_path / "a.h5").size_level0 == 512
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].attrs["encoder"] == file.attrs["encoder"] == "plip"
    with pytest.raises(ValueError, match=r"\(N, dim\)"):
        write_features(tmp_path / "b.h5", features, coords[:4], encoder="plip")
    assert not (tmp_path / "b.h5").exists()
