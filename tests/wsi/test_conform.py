"""Feature files in the layouts of other tools: sound files pass, and each defect is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from pathcore.rows import write_csv
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.conform import FeatureFileError, check, converted, read_feature_file
from wsi.store import read_coordinates, read_features
from xtuner_add import cli

WIDTH, HEIGHT = 30_000, 12_000
DIM = 1024


def grid(step: int, rows: int = 8, columns: int = 16, start: int = 512) -> NDArray[np.int64]:
    """Tiles in rows with gaps; wider than high, so that exchanged axes leave the slide."""
    y, x = np.mgrid[0:rows, 0:columns]
    places = np.stack([x.ravel(), y.ravel()], axis=1)
    return (places[places.sum(axis=1) % 7 != 1] * step + start).astype(np.int64)


def random_features(count: int, dim: int = DIM, dtype: Any = np.float32) -> NDArray[Any]:
    return np.random.default_rng(0).normal(size=(count, dim)).astype(dtype)


def trident(path: Path, coords: NDArray[Any], features: NDArray[Any], **changes: Any) -> Path:
    """Layout of TRIDENT's patch features: attributes on `coords`, written by h5py."""
    attributes = {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40,
        "target_magnification": 20, "overlap": 0, "name": path.stem, "savetodir": "out",
        "level0_width": WIDTH, "level0_height": HEIGHT, **changes,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["coords"] = coords
        file["coords"].attrs.update({k: v for k, v in attributes.items() if v is not None})
    return path


def clam(path: Path, coords: NDArray[Any], features: NDArray[Any]) -> Path:
    """Layout of CLAM: a batch of one, attributes of the level that was read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features[None]
        file["coords"] = coords
        attributes = {"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0])}
        file["coords"].attrs.update(attributes)
    return path


def stamp(path: Path, coords_um: NDArray[Any], features: NDArray[Any]) -> Path:
    """Layout of STAMP: `feats` in float16, coordinates in micrometres."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = coords_um.astype(np.float32)
        file["feats"] = features.astype(np.float16)
        file.attrs.update(
            stamp_version="2.3.0", extractor="uni-3f1c9a7d", unit="um", tile_size_um=256.0,
            tile_size_px=224, code_hash="x", feat_type="tile",
        )  # fmt: skip
    return path


def slide2vec(path: Path, coords: NDArray[Any], features: NDArray[Any]) -> Path:
    """Layout of slide2vec: an archive, and JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, features=features, coords=coords)
    meta = {"sample_id": path.stem, "encoder_name": "uni", "tile_size_px": 224, "spacing_um": 0.5}
    path.with_name(f"{path.stem}.meta.json").write_text(json.dumps(meta))
    return path


def sound_files(folder: Path) -> list[Path]:
    tiles = grid(512)
    count = len(tiles)
    return [
        trident(folder / "features_uni_v1" / "a.h5", tiles, random_features(count)),
        trident(folder / "features_uni_v2" / "b.h5", tiles, random_features(count, 1536)),
        trident(folder / "f" / "half.h5", tiles, random_features(count, dtype=np.float16)),
        trident(folder / "f" / "float.h5", tiles.astype(np.float64), random_features(count)),
        trident(folder / "f" / "overlap.h5", grid(256), random_features(count), overlap=128),
        trident(
            folder / "f" / "same.h5", grid(256), random_features(count), patch_size_level0=256,
            level0_magnification=20,
        ),
        trident(
            folder / "f" / "odd.h5", grid(507), random_features(count), patch_size_level0=507,
            level0_magnification=39.6,
        ),
        trident(folder / "f" / "few.h5", tiles[:3], random_features(3)),
        trident(folder / "f" / "corner.h5", grid(512, 2, 2, start=0), random_features(2)),
        clam(folder / "g" / "clam.h5", grid(1024), random_features(count)),
        stamp(folder / "g" / "stamp.h5", grid(256), random_features(count)),
        slide2vec(folder / "g" / "slide2vec.npz", grid(448), random_features(count)),
    ]  # fmt: skip


def test_nothing_is_found_in_twelve_sound_files(tmp_path: Path) -> None:
    files = sound_files(tmp_path)
    assert len(files) == 12
    for path in files:
        file = read_feature_file(path)
        assert check(file) == [], path.name
        assert json.loads(json.dumps(file.describe()))["num_tiles"] == len(file.features)


def planted(folder: Path) -> dict[str, Path]:
    tiles = grid(512)
    count = len(tiles)
    features = random_features(count)
    overflown = features.astype(np.float16)
    overflown[3, 7] = np.inf
    unknown = features.copy()
    unknown[2, 0] = np.nan
    wide = random_features(4000)
    squeezed = np.random.default_rng(1).integers(0, 1001, (4000, 2))
    squeezed[0] = (0, 1000)
    left = tiles.copy()
    left[0, 0] = -256
    far = tiles.copy()
    far[5] = (WIDTH + 512, HEIGHT + 512)
    return {
        "swapped axes": trident(folder / "1.h5", grid(512, 8, 50)[:, ::-1], random_features(
            len(grid(512, 8, 50)))),
        "coordinates of another level": trident(folder / "2.h5", grid(256), features),
        "normalised coordinates": trident(folder / "3.h5", squeezed, wide),
        "tiles of another scale": trident(
            folder / "4.h5", tiles, features, target_magnification=10
        ),
        "float16 overflow": trident(folder / "5.h5", tiles, overflown),
        "duplicate tiles": trident(
            folder / "6.h5", np.concatenate([tiles, tiles[:9]]), random_features(count + 9)
        ),
        "wrong width": trident(folder / "features_uni_v2" / "7.h5", tiles, features),
        "different lengths": trident(folder / "8.h5", tiles[:-4], features),
        "NaN": trident(folder / "9.h5", tiles, unknown),
        "all tiles alike": trident(folder / "10.h5", tiles, np.ones((count, DIM), np.float32)),
        "negative coordinates": trident(folder / "11.h5", left, features),
        "outside of the slide": trident(folder / "12.h5", far, features),
    }  # fmt: skip


def test_each_of_twelve_planted_defects_is_named(tmp_path: Path) -> None:
    files = planted(tmp_path)
    assert len(files) == 12
    for defect, path in files.items():
        found = [finding.defect for finding in check(read_feature_file(path))]
        assert found == [defect], path.name


def test_what_can_be_mended_is_mended(tmp_path: Path) -> None:
    files = planted(tmp_path)
    expected = {
        "swapped axes": grid(512, 8, 50),
        "coordinates of another level": grid(256) * 2,
        "duplicate tiles": grid(512),
    }
    for defect, coords in expected.items():
        file = read_feature_file(files[defect])
        out = tmp_path / "out" / files[defect].name
        assert converted(file, check(file), out) == len(coords)
        features, found = read_features(out)
        assert np.array_equal(found, coords), defect
        assert np.array_equal(features, file.features[: len(coords)])
        assert (read_coordinates(out).size_level0, read_coordinates(out).patch_px) == (512, 256)
        assert check(read_feature_file(out)) == [], defect
    for defect in set(files) - set(expected):
        file = read_feature_file(files[defect])
        with pytest.raises(FeatureFileError, match=f"cannot be converted: {defect}"):
            converted(file, check(file), tmp_path / "no.h5")
        assert not (tmp_path / "no.h5").exists()


def test_micrometres_become_pixels_of_level_0(tmp_path: Path) -> None:
    tiles = grid(512)
    path = stamp(tmp_path / "a.h5", tiles * 0.25, random_features(len(tiles)))
    file = read_feature_file(path)
    assert (file.layout, file.encoder, file.unit) == ("STAMP", "uni", "um")
    with pytest.raises(FeatureFileError, match="pass mpp_level0="):
        converted(file, [], tmp_path / "out.h5")
    converted(file, [], tmp_path / "out.h5", mpp_level0=0.25)
    assert np.array_equal(read_features(tmp_path / "out.h5")[1], tiles)
    assert read_coordinates(tmp_path / "out.h5").size_level0 == 1024


def test_files_that_hold_no_features(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "coords.h5", "w") as file:
        file["coords"] = np.zeros((3, 2))
    with pytest.raises(FeatureFileError, match="neither `features` nor `feats`"):
        read_feature_file(tmp_path / "coords.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(FeatureFileError, match="cannot be read"):
        read_feature_file(tmp_path / "text.h5")
    with pytest.raises(FileNotFoundError):
        read_feature_file(tmp_path / "absent.h5")


def test_damaged_files_stop_no_other(tmp_path: Path) -> None:
    tiles, folder = grid(512), tmp_path / "f"
    features = random_features(len(tiles))
    whole = slide2vec(folder / "whole.npz", tiles, features)
    content = whole.read_bytes()
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    (folder / "spoilt.npz").write_bytes(content[:500] + bytes(500) + content[1000:])
    (folder / "empty.npz").touch()
    np.save(folder / "array.npy", features)
    (folder / "array.npy").rename(folder / "array.npz")
    slide2vec(folder / "line.npz", tiles[:, 0], features)
    slide2vec(folder / "one.npz", tiles, features[0])
    slide2vec(folder / "list.npz", tiles, features)
    (folder / "list.meta.json").write_text("[]")
    slide2vec(folder / "far.npz", np.where(tiles == 512, np.inf, tiles), features)
    trident(folder / "far2.h5", np.where(tiles == 512, 1e30, tiles), features)
    trident(folder / "nan.h5", np.where(tiles == 512, np.nan, tiles), features)
    result = CliRunner().invoke(
        cli.main, ["conform", str(folder), "--output", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 3, result.output
    rows = {Path(row["file"]).stem: row for row in map(json.loads, result.output.splitlines())}
    assert len(rows) == 11
    for name, row in rows.items():
        assert f"{name}." in row.get("error", "whole."), row
    assert "19 tiles are no position in a slide, the first [inf, inf]" in rows["far"]["error"]
    assert "no tile size found" in rows["whole"]["error"]  # as slide2vec states none in level 0
    assert not (tmp_path / "out").exists()


def test_the_command_says_it_of_a_folder_and_converts(tmp_path: Path) -> None:
    files = planted(tmp_path / "bad")
    trident(tmp_path / "good" / "a.h5", grid(512), random_features(len(grid(512))))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.main, ["conform", *map(str, arguments)])

    result = run(tmp_path / "good")
    assert result.exit_code == 0, result.output
    assert "sound" in result.output and "TRIDENT" in result.output
    result = run(files["swapped axes"], files["NaN"], "--output", tmp_path / "out")
    assert result.exit_code == 3
    assert "swapped axes" in result.output and "NaN" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.h5"]
    assert run(files["NaN"]).exit_code == 1
    rows = [json.loads(line) for line in run(tmp_path / "bad", "--json").output.splitlines()]
    assert {row["findings"][0]["defect"] for row in rows} == set(files)
    assert run(tmp_path / "good", "--encoder", "uni2-h").exit_code == 1
    assert run(tmp_path / "nothing").exit_code == 2
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty").exit_code == 2


def test_converted_files_keep_their_folders_and_replace_nothing(tmp_path: Path) -> None:
    tiles = grid(512)
    folder, out = tmp_path / "f", tmp_path / "out"
    for encoder, dim in (("uni_v1", 1024), ("uni_v2", 1536)):
        trident(folder / f"features_{encoder}" / "a.h5", tiles, random_features(len(tiles), dim))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.main, ["conform", *map(str, arguments)])

    assert run(folder, "--output", out).exit_code == 0
    for encoder, dim in (("uni_v1", 1024), ("uni_v2", 1536)):
        assert read_features(out / f"features_{encoder}" / "a.h5")[0].shape == (len(tiles), dim)
    one = folder / "features_uni_v1"
    assert run(one, one / "a.h5", "--output", tmp_path / "same").exit_code == 0
    assert (tmp_path / "same/a.h5").is_file()

    before = (one / "a.h5").read_bytes()
    slide2vec(one / "b.npz", tiles, random_features(len(tiles)))
    for arguments, message in (
        ((one, "--output", one), "would replace"),
        ((one / "a.h5", "--output", folder / "features_uni_v2" / ".." / one.name), "would replace"),
        ((one, folder / "features_uni_v2", "--output", tmp_path / "new"), "would be written from"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.output, result.output
    assert (one / "a.h5").read_bytes() == before and not (tmp_path / "new").exists()


def test_size_and_resolution_come_from_the_slide_of_the_same_name(tmp_path: Path) -> None:
    tiles = grid(64, 4, 4, start=0)
    names = ["a", "b[1]", "deep", "twice", "absent"]
    for name in names:
        stamp(tmp_path / "f" / f"{name}.h5", tiles * 0.5, random_features(len(tiles)))
    slides = tmp_path / "slides"
    slides.mkdir()
    Image.fromarray(tissue_pixels(64, 48)).save(slides / "a.png")  # a thumbnail
    write_svs(slides / "a.new.svs", tissue_pixels(300, 300), mpp=0.125)
    for path in ("a.svs", "b[1].svs", "sub/deep.svs", "1/twice.svs", "2/twice.svs"):
        write_svs(slides / path, tissue_pixels(400, 300), mpp=0.5)
    out = tmp_path / "out"
    result = CliRunner().invoke(
        cli.main,
        ["conform", str(tmp_path / "f"), "--slides", str(slides), "--output", str(out), "--json"],
    )
    assert result.exit_code == 3, result.output
    for name in ("a", "b[1]", "deep"):
        assert np.array_equal(read_features(out / f"{name}.h5")[1], tiles), name
    rows = [json.loads(line) for line in result.output.splitlines()]
    errors = {Path(row["file"]).stem: row["error"] for row in rows if "error" in row}
    assert set(errors) == {"twice", "absent"} == set(names) - {path.stem for path in out.iterdir()}
    assert "2 slides have this name" in errors["twice"]
    assert "absent.h5: no slide of this name under" in errors["absent"]
    write_csv(tmp_path / "t.csv", ["path", "mpp"], [["slides/a.svs", "0.25"]])
    one = ["conform", str(tmp_path / "f/a.h5"), "--slides", str(tmp_path / "t.csv")]
    assert CliRunner().invoke(cli.main, [*one, "--output", str(tmp_path / "o")]).exit_code == 0
    assert np.array_equal(read_features(tmp_path / "o/a.h5")[1], tiles * 2)


def test_features_of_another_scan_are_named(tmp_path: Path) -> None:
    tiles = grid(64, 4, 4, start=0)
    size = {"level0_width": 400, "level0_height": 300, "patch_size": 64, "patch_size_level0": 64,
            "target_magnification": 40}  # fmt: skip
    for name in ("a", "b"):
        trident(tmp_path / "f" / f"{name}.h5", tiles, random_features(len(tiles)), **size)
    write_svs(tmp_path / "slides" / "a.svs", tissue_pixels(400, 300))
    write_svs(tmp_path / "slides" / "b.svs", tissue_pixels(800, 600))
    arguments = ["conform", tmp_path / "f", "--slides", tmp_path / "slides", "--json"]
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    found = [json.loads(line)["findings"] for line in result.output.splitlines()]
    assert [[finding["defect"] for finding in own] for own in found] == [[], ["another slide"]]
