"""From slides and coordinates to selected patches, with tiny encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pathcore.encoders import create_encoder
from pathgen.selection.features import slide_features
from tests.pathgen.conftest import read_rows
from tests.pathgen.describer_server import DescriberServer
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip
from tests.wsi.qupath import read_valid
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import Slide
from wsi.store import read_attributes, read_coordinates, read_features, write_coordinates
from wsi.tiling import PatchSpec, tile
from xtuner_add import cli

PATCH_PX = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides with coordinates, an open_clip folder."""
    root = tmp_path_factory.mktemp("selection")
    (root / "coords").mkdir()
    for number, name in enumerate(("a", "b")):
        pixels = tissue_pixels(768, 512, seed=number)
        path = write_svs(root / "slides" / f"{name}.svs", pixels)
        with Slide(path) as slide:
            spec = PatchSpec(PATCH_PX, 0.5)
            write_coordinates(root / "coords" / f"{name}.h5", slide, tile(slide, spec))
    save_open_clip(root / "encoder")
    return root


@pytest.fixture(scope="module")
def spec(folder: Path) -> str:
    return f"open_clip:local-dir:{folder / 'encoder'}"


def run(folder: Path, spec: str, out: Path, *options: object) -> Result:
    arguments = [
        "select-patches", folder / "coords", "--slides", folder / "slides", "--output", out,
        "--encoder", spec, "--device", "cpu", "--quiet", *options,
    ]  # fmt: skip
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_encoders_of_both_libraries(folder: Path, spec: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(3)]
    for name in (spec, save_hugging_face(tmp_path / "hf")):
        encoder = create_encoder(name, device="cpu")
        pictures = encoder.encode_images(images)
        words = encoder.encode_texts(["dense stroma", "fat", "a very long text " * 60])
        assert pictures.shape == words.shape == (3, 16)
        np.testing.assert_allclose(np.linalg.norm(pictures, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(encoder.encode_images(images[1:2]), pictures[1:2], atol=1e-5)
        assert abs(pictures[0] - pictures[1]).max() > 1e-4
        assert abs(words[0] - words[1]).max() > 1e-4
    other = create_encoder(save_open_clip(tmp_path / "encoder", seed=1), device="cpu")
    assert other.folder_name != create_encoder(spec, device="cpu").folder_name, (
        "the weights are part of the name"
    )


def test_features_are_computed_once(
    folder: Path, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = create_encoder(spec, device="cpu")
    coords = folder / "coords" / "a.h5"
    slide = shutil.copy(folder / "slides" / "a.svs", tmp_path / "a.svs")
    first = slide_features(slide, coords, encoder, tmp_path, batch_size=5)
    assert first.features.shape == (len(read_coordinates(coords).coords), 16)
    assert not first.reused
    with monkeypatch.context() as patch:
        patch.setattr("wsi.features.Slide", lambda path: pytest.fail("opened again"))
        second = slide_features(slide, coords, encoder, tmp_path, batch_size=5)
    assert second.reused
    np.testing.assert_array_equal(second.features, first.features)
    with Slide(folder / "slides" / "a.svs") as opened:
        half = tile(opened, PatchSpec(PATCH_PX // 2, 0.5))
        write_coordinates(tmp_path / "a.h5", opened, half)
    third = slide_features(folder / "slides" / "a.svs", tmp_path / "a.h5", encoder, tmp_path)
    assert not third.reused, "other coordinates"
    shutil.copy(folder / "slides" / "b.svs", tmp_path / "a.svs")
    fourth = slide_features(slide, coords, encoder, tmp_path)
    assert not fourth.reused, "another slide under the same name"


def test_the_command(folder: Path, spec: str, tmp_path: Path) -> None:
    reports = tmp_path / "reports.jsonl"
    reports.write_text(json.dumps({"wsi_id": "a", "report": "Invasive carcinoma of the breast."}))
    options = ("--quota", 8, "--cancer-type", "BRCA", "--reports", reports, "--similarity", 1)
    result = run(folder, spec, tmp_path / "out", *options, "--geojson")
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "out" / "selection.jsonl")
    assert [row["wsi_id"] for row in rows] == ["a"] * 8 + ["b"] * 8
    sources = [row["chosen_for"] for row in rows]
    assert sources[:8] == ["prompt"] * 2 + ["report"] * 2 + ["cluster"] * 4
    assert sources[8:] == ["prompt"] * 2 + ["cluster"] * 6, "no report: its share goes on"
    assert rows[0]["label"] and rows[0]["text"]
    squares = read_valid(tmp_path / "out" / "geojson" / "a.geojson")
    for row, square in zip(rows[:8], squares, strict=True):
        found = square["properties"]
        assert found["classification"]["name"] == row["chosen_for"]
        assert found["measurements"]["cluster"] == row["cluster"]
        assert square["geometry"]["coordinates"][0][0] == [int(p) for p in row["position"]]
    assert rows[2]["text"] == "Invasive carcinoma of the breast."
    chosen = read_coordinates(tmp_path / "out" / "coords" / "a.h5")
    assert chosen.size_level0 == read_coordinates(folder / "coords" / "a.h5").size_level0
    assert {tuple(map(str, xy)) for xy in chosen.coords.tolist()} == {
        tuple(row["position"]) for row in rows[:8]
    }
    features, _ = read_features(tmp_path / "out" / "coords" / "a.h5")
    assert features.shape == (8, 16)
    source = read_attributes(folder / "coords" / "a.h5")
    assert read_attributes(tmp_path / "out" / "coords" / "a.h5").keys() == source.keys()
    picture = Image.open(tmp_path / "out" / "pictures" / "a.jpg")
    assert picture.width > 2 * 700 and picture.height > 500
    first = (tmp_path / "out" / "selection.jsonl").read_bytes()
    result = run(folder, spec, tmp_path / "out", *options)
    assert "features of 2 were cached" in result.output
    assert (tmp_path / "out" / "selection.jsonl").read_bytes() == first


def test_chosen_patches_are_extracted_and_described(
    folder: Path, spec: str, tmp_path: Path, server: DescriberServer
) -> None:
    chosen, patches = tmp_path / "chosen", tmp_path / "patches"
    assert run(folder, spec, chosen, "--quota", 3, "--similarity", 1).exit_code == 0
    steps = [
        ["extract", chosen / "coords", "--slides", folder / "slides", "--output", patches,
         "--workers", 1, "--quiet"],
        ["describe", chosen / "selection.jsonl", tmp_path / "pairs.jsonl", "--image-folder",
         patches,
         "--endpoint", server.url, "--model", "m"],
    ]  # fmt: skip
    for arguments in steps:
        result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    pairs = read_rows(tmp_path / "pairs.jsonl")
    assert len(pairs) == 6
    for pair in pairs:
        assert (patches / pair["image"]).is_file()
        assert pair["caption"].startswith("Sheets of atypical")


def test_slides_that_cannot_be_used_are_named(folder: Path, spec: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "coords", broken / "coords")
    (broken / "slides").mkdir()
    shutil.copy(folder / "slides" / "a.svs", broken / "slides" / "a.svs")
    shutil.copy(broken / "coords" / "a.h5", broken / "coords" / "gone.h5")
    (broken / "coords" / "text.h5").write_text("no HDF5")
    (broken / "slides" / "b.svs").write_bytes((folder / "slides" / "b.svs").read_bytes()[:3000])
    (broken / "slides" / "text.svs").write_text("no slide")
    result = run(broken, spec, tmp_path / "out", "--quota", 4, "--no-pictures")
    assert result.exit_code == 3, result.output
    left = {
        row["wsi_id"]: row["reason"]
        for row in read_rows(tmp_path / "out" / "selection.skipped.jsonl")
    }
    assert set(left) == {"b", "gone", "text"}
    assert "no slide of this name" in left["gone"]
    assert {row["wsi_id"] for row in read_rows(tmp_path / "out" / "selection.jsonl")} == {"a"}
    assert not (tmp_path / "out" / "pictures").exists()


def test_wrong_usage(folder: Path, spec: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong, words in {
        "song:x": "open_clip:ARCH@WEIGHTS",
        "open_clip:ViT-B-32": "name a tag or a file",
        "open_clip:No-Such@x": "no architecture No-Such",
        "open_clip:ViT-B-32@absent.pt": "neither a file nor one of",
        "open_clip:local-dir:/absent": "no open_clip_config.json in this folder",
        "hf:/absent": "no such folder",
    }.items():
        result = run(folder, wrong, out)
        assert result.exit_code == 1, wrong
        assert words in result.output
    assert "cancer type 'X'" in run(folder, spec, out, "--cancer-type", "X").output
    (tmp_path / "types.json").write_text('{"a": 3}')
    result = run(folder, spec, out, "--cancer-types", tmp_path / "types.json")
    assert "expected text" in result.output
