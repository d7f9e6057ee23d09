"""Bags of tile features: valid files, and error messages for invalid ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pallava.slide_bags import (
    BagFolder,
    SlideBag,
    SlideBagError,
    SlidePreparation,
    read_bag,
    read_slide_embedding,
)
from pathcore.encoders.origin import TileOrigin
from pathcore.images import ImageError
from tests.pallava.bags import TILE_PX, write_bag

NAN = np.ones((12, 32), np.float32)
NAN[5, 7] = np.nan
OVERFLOWN = np.ones((12, 32), np.float16)
OVERFLOWN[3] = np.inf


def test_reads_what_the_store_of_slides_writes(tmp_path: Path) -> None:
    from wsi.store import write_features

    features = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float16)
    coords = np.array([[0, 0], [448, 0], [896, 0], [0, 448], [448, 448], [896, 448]])
    attributes = {"patch_size": 224, "patch_size_level0": 448}
    write_features(
        tmp_path / "case1.h5", features, coords, encoder="gigapath", attributes=attributes
    )
    bag = read_bag(tmp_path / "case1.h5", in_features=8)
    assert bag.features.dtype == torch.float16
    np.testing.assert_array_equal(bag.features.numpy(), features)
    np.testing.assert_array_equal(bag.positions.numpy(), coords / 448)
    assert bag.slide_embedding is None


@pytest.mark.parametrize(
    ("attributes", "side_px"),
    [
        ({"patch_size_level0": 512}, 512),
        ({"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}, 512),
        ({"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0])}, 1024),
        ({"patch_size": 1024, "patch_level": 0}, 1024),
        ({}, 512),
    ],
    ids=["trident", "older-trident", "clam", "clam-level-0", "grid"],
)
def test_side_of_a_tile(tmp_path: Path, attributes: dict[str, Any], side_px: int) -> None:
    bag = read_bag(write_bag(tmp_path / "a.h5", attributes=attributes))
    assert bag.positions[0].tolist() == [3 * TILE_PX / side_px] * 2
    assert (bag.positions[1, 0] - bag.positions[0, 0]).item() == TILE_PX / side_px


def test_a_side_that_is_said_goes_first(tmp_path: Path) -> None:
    coords = np.random.default_rng(0).integers(0, 9000, (12, 2))
    path = write_bag(tmp_path / "a.h5", attributes={}, coords=coords)
    with pytest.raises(SlideBagError, match=r"patch_size_level0 of coords.*say tile_size_level0"):
        read_bag(path)
    np.testing.assert_allclose(read_bag(path, tile_size_level0=100).positions, coords / 100)


def test_a_single_tile_and_a_batch_of_one(tmp_path: Path) -> None:
    one = read_bag(write_bag(tmp_path / "one.h5", num_tiles=1, attributes={}))
    assert one.features.shape == (1, 32) and one.positions.shape == (1, 2)
    values = np.ones((1, 12, 32), np.float32)
    assert read_bag(write_bag(tmp_path / "batch.h5", features=values)).features.shape == (12, 32)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"features": NAN}, "1 of 12 tiles hold NaN or infinity, the first is row 5"),
    "overflow": ({"features": OVERFLOWN}, "1 of 12 tiles hold NaN or infinity, the first is row 3"),
    "wrong_width": ({"width": 16}, "16 wide, the model takes 32.*another encoder .some-encoder."),
    "zero_tiles": ({"num_tiles": 0}, "no tile; was no tissue found"),
    "too_many": ({"num_tiles": 41}, "41 tiles, at most 40 allowed"),
    "lengths": ({"coords": np.zeros((11, 2), int)}, r"features \(12, 32\) and coords \(11, 2\)"),
    "columns": ({"coords": np.zeros((12, 3), int)}, r"coords \(12, 3\)"),
    "vector": ({"features": np.ones(12)}, r"features \(12,\)"),
    "no_coords": ({"coords": None}, "no dataset coords, found features"),
    "nothing": (
        {"coords": None, "features": None},
        "no dataset features and coords, found nothing",
    ),
    "fractions": ({"coords": np.full((12, 2), 0.5)}, "not whole level-0 pixels"),
    "side_0": ({"attributes": {"patch_size_level0": 0}}, "side of a tile is not stated"),
    "odd_attributes": ({"attributes": {"patch_level": 1}}, "do not say how large a tile is"),
    "strings": ({"features": np.full((12, 32), b"a")}, "features or coords are no numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used(tmp_path: Path, fault: str) -> None:
    changes, words = FAULTS[fault]
    path = write_bag(tmp_path / "bad.h5", **changes)
    with pytest.raises(SlideBagError, match=words) as error:
        read_bag(path, in_features=32, max_tiles=40)
    assert str(path) in str(error.value)
    assert isinstance(error.value, ImageError), "what skips an image must skip a slide"


def test_coordinates_in_another_unit(tmp_path: Path) -> None:
    places = np.stack(np.meshgrid(np.arange(20), np.arange(20)), axis=-1).reshape(-1, 2)
    path = write_bag(tmp_path / "a.h5", num_tiles=400, coords=places)
    with pytest.raises(SlideBagError, match="400 tiles of 512 px are at 1 position"):
        read_bag(path)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.95])
def test_half_written(tmp_path: Path, kept: float) -> None:
    whole = write_bag(tmp_path / "whole.h5", num_tiles=500).read_bytes()
    path = tmp_path / "half.h5"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(SlideBagError, match=r"half.h5: cannot be read as HDF5"):
        read_bag(path)


def test_a_group_instead_of_an_array(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("features")
        file.create_group("coords")
    with pytest.raises(SlideBagError, match="no dataset features and coords"):
        read_bag(tmp_path / "a.h5")


NAMES = {
    "../secret": "resolves to a path outside",
    "/etc/secret": "resolves to a path outside",
    "cohort/../../secret": "resolves to a path outside",
    "absent": "no such file",
    "a\0b": "a.b.h5",
    "": "no such file",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_paths(tmp_path: Path, name: str) -> None:
    write_bag(tmp_path / "secret.h5")
    folder = tmp_path / "features"
    write_bag(folder / "case1.h5")
    bags = BagFolder(folder)
    with pytest.raises(SlideBagError, match=NAMES[name]):
        bags.read(name)
    index = bags.index([name, "case1"])
    assert list(index.errors) == [name] and index.num_tiles == {"case1": 12}


def test_names_may_have_a_cohort_and_a_suffix(tmp_path: Path) -> None:
    write_bag(tmp_path / "cohort" / "case1.h5")
    bags = BagFolder(tmp_path)
    for name in ("cohort/case1", "cohort/case1.h5"):
        assert bags.read(name).features.shape == (12, 32)


def test_slide_embeddings(tmp_path: Path) -> None:
    write_bag(tmp_path / "tiles" / "a.h5")
    vector = np.arange(8.0)
    write_bag(tmp_path / "slides" / "a.h5", features=vector[None], coords=None)
    bag = BagFolder(tmp_path / "tiles", slide_embeddings=tmp_path / "slides").read("a")
    assert bag.slide_embedding is not None
    np.testing.assert_array_equal(bag.slide_embedding, vector)
    path = write_bag(tmp_path / "slides" / "b.h5", features=vector.reshape(2, 4), coords=None)
    with pytest.raises(SlideBagError, match=r"expected one vector .*, found \(2, 4\)"):
        read_slide_embedding(path)
    path = write_bag(tmp_path / "slides" / "c.h5", features=vector * np.nan, coords=None)
    with pytest.raises(SlideBagError, match="NaN"):
        read_slide_embedding(path)
    index = BagFolder(tmp_path / "tiles", slide_embeddings=tmp_path / "slides").index(["a", "b"])
    assert list(index.errors) == ["b"]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        BagFolder(tmp_path / "nowhere")


def test_what_is_shown_to_a_model_of_slides(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "a.h5")
    assert SlidePreparation(32)(path).features.shape == (12, 32)
    with pytest.raises(SlideBagError, match=r"a.embedding.h5: no such file"):
        SlidePreparation(32, 8)(path)
    write_bag(tmp_path / "a.embedding.h5", features=np.ones(8), coords=None)
    embedding = SlidePreparation(32, 8)(path).slide_embedding
    assert embedding is not None and embedding.shape == (8,)
    with pytest.raises(SlideBagError, match="int: this model reads whole slides"):
        SlidePreparation(32)(3)


def test_a_bag_travels_as_a_tuple_of_tensors(tmp_path: Path) -> None:
    bag = read_bag(write_bag(tmp_path / "a.h5")).to("meta")
    assert isinstance(bag, SlideBag)
    assert bag.features.is_meta and bag.positions.is_meta and bag.slide_embedding is None


UNI = TileOrigin("uni", 256, 0.5)
TRIDENT = {"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}


@pytest.mark.parametrize(
    ("encoder", "attributes", "fault"),
    [
        ("uni_v1", TRIDENT, ""),  # TRIDENT's name of it
        ("uni_0123456789ab", {**TRIDENT, "encoder_name": "uni@class", "mpp": 0.503}, ""),
        ("weights-0123abcd", TRIDENT, ""),  # a folder of weights: cannot be compared
        ("some-encoder", {}, ""),
        ("uni_v2", TRIDENT, "of uni2-h, 256 px at 0.5"),
        ("x", {"encoder_name": "hf:owner/other"}, "of hf:owner/other"),
        ("uni_v1", {**TRIDENT, "target_magnification": 10}, "of uni, 256 px at 1 µm"),
        ("uni_v1", {**TRIDENT, "patch_size": 512}, "of uni, 512 px"),
    ],
)
def test_features_of_other_tiles_are_refused(
    tmp_path: Path, encoder: str, attributes: dict[str, Any], fault: str
) -> None:
    path = write_bag(tmp_path / "a.h5", attributes=attributes)
    with h5py.File(path, "r+") as file:
        file.attrs["encoder"] = encoder
    prepare = SlidePreparation(32, origin=UNI)
    index = BagFolder(tmp_path, 32, origin=UNI).index(["a"])
    if not fault:
        assert len(prepare(path).features) == 12 and index.errors == {}
        return
    with pytest.raises(SlideBagError, match=fault) as caught:
        prepare(path)
    assert "the model was trained on uni, 256 px at 0.5 µm per pixel" in str(caught.value)
    assert fault in index.errors["a"]
