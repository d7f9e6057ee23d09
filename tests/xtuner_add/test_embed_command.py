"""``xtuner-add embed`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from gigapath import slide_encoder as slide_encoders
from tests.gigapath.tiny_encoders import write_tile_encoder
from tests.pathgen.tiny_encoders import save_open_clip
from tests.wsi.real_data import real_file
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.store import read_features
from xtuner_add.cli import main

ARCH = "tiny_command_slide_enc12l"
slide_encoders.register_architecture(
    ARCH, embed_dim=32, depth=12, num_heads=4, segment_lengths=(8, 16, 32, 64, 128)
)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["embed", *map(str, arguments), "--quiet"])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options that name a tile encoder and a slide encoder in the released layout."""
    folder = tmp_path_factory.mktemp("encoders")
    write_tile_encoder(folder / "enc")
    generator = torch.Generator().manual_seed(0)
    weights = slide_encoders.create_model("", ARCH, 48).state_dict()
    for name, tensor in weights.items():  # with norms of 1, two of them in a row are one
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise
    torch.save({"model": weights}, folder / "enc" / "slide_encoder.pth")
    options = ["--tile-encoder", folder / "enc", "--slide-encoder", folder / "enc"]
    return [*options, "--slide-arch", ARCH, "--patch-px", 64, "--batch-size", 8]


def test_good_and_bad_slides(encoders: list[object], tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    write_svs(slides / "good.svs", tissue_pixels(600, 500, blank=0.3), mpp=0.25)
    write_svs(slides / "glass.svs", np.full((400, 400, 3), 243, np.uint8), mpp=0.5)
    write_svs(slides / "unknown.svs", tissue_pixels(400, 400), mpp=None, magnification=20)
    (slides / "broken.svs").write_text("not found")
    result = invoke(slides, "--output", out, *encoders)
    assert result.exit_code == 3, result.output
    assert "Wrote 1 slide to" in result.output and "Skipped 1: no tissue" in result.output
    rows = {row["slide"]: row for row in map(json.loads, (out / "manifest.jsonl").open())}
    assert {name: row.get("reason") for name, row in rows.items()} == {
        "good": None,
        "glass": "no tissue",
        "unknown": "resolution unknown",
        "broken": "slide unreadable",
    }
    assert "--slide-mpp" in rows["unknown"]["detail"]
    features, coords = read_features(out / rows["good"]["features"])
    assert features.shape == (rows["good"]["tiles"], 48) and rows["good"]["size_level0"] == 128
    assert coords[:, 0].min() >= 128  # the left third is glass
    with np.load(out / "slide_embeddings.npz") as table:
        assert table["slides"].tolist() == ["good"] and table["features"].shape == (1, 32)
    for kind in ("overlays", "pictures", "thumbnails"):
        assert {p.name for p in (out / kind).iterdir()} >= {"good.jpg"}
        Image.open(out / kind / "good.jpg").verify()

    before = {p: p.stat().st_mtime_ns for p in (out / "features").rglob("*.h5")}
    (slides / "broken.svs").unlink()
    write_svs(slides / "broken.svs", tissue_pixels(400, 300, seed=3), mpp=0.5)
    assert invoke(slides, "--output", out, *encoders).exit_code == 3
    result = invoke(slides, "--output", out, *encoders, "--retry-skipped")
    assert "Wrote 2 slides" in result.output and result.exit_code == 3
    assert before.items() <= {p: p.stat().st_mtime_ns for p in before}.items()
    with np.load(out / "slide_embeddings.npz") as table:
        assert table["slides"].tolist() == ["broken", "good"]
    result = invoke(slides, "--output", out, *encoders, "--preset", "trident")
    assert result.exit_code == 1 and "was begun with other settings" in result.output


def test_presets_make_other_vectors(encoders: list[object], tmp_path: Path) -> None:
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(500, 400), mpp=0.5)
    vectors = {}
    for preset in ("mean", "pipeline", "trident", "lazyslide"):
        out = tmp_path / preset
        result = invoke(slide, "--output", out, *encoders, "--preset", preset, "--no-pictures")
        assert result.exit_code == 0, result.output
        (path,) = (out / "slide_features").rglob("s.h5")
        with h5py.File(path, "r") as file:
            vectors[preset] = np.asarray(file["features"])
        assert not (out / "pictures").exists()
    names = list(vectors)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert np.abs(vectors[name] - vectors[other]).max() > 1e-3, (name, other)


def test_coordinates_of_another_tool(encoders: list[object], tmp_path: Path) -> None:
    slide = write_svs(tmp_path / "slides" / "s.svs", tissue_pixels(500, 400), mpp=0.5)
    (tmp_path / "coords").mkdir()
    attributes = {"patch_size": 64, "patch_level": 0, "name": "s"}
    with h5py.File(tmp_path / "coords" / "s_patches.h5", "w") as file:
        file["coords"] = np.array([[128, 0], [0, 64], [0, 0]])
        file["coords"].attrs.update(attributes)
    options = ["--coords", tmp_path / "coords", *encoders[:6]]  # without --patch-px
    result = invoke(slide, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out" / "features").rglob("s.h5")
    assert read_features(path)[1].tolist() == [[0, 0], [128, 0], [0, 64]]
    for coords, reason in (
        ([[0, 0], [4000, 0]], "coordinates of another slide"),
        (np.zeros((0, 2), int), "no tissue"),
    ):
        with h5py.File(tmp_path / "coords" / "s_patches.h5", "w") as file:
            file["coords"] = np.array(coords)
            file["coords"].attrs.update(attributes)
        result = invoke(slide, "--output", tmp_path / reason, *options)
        assert result.exit_code == 3 and f"Skipped 1: {reason}" in result.output
    whole = (tmp_path / "coords" / "s_patches.h5").read_bytes()
    (tmp_path / "coords" / "s_patches.h5").write_bytes(whole[: len(whole) // 2])
    result = invoke(slide, "--output", tmp_path / "half", *options)
    assert result.exit_code == 3
    assert "s_patches.h5" in (tmp_path / "half" / "skipped.jsonl").read_text()


def test_folders_of_tiles(encoders: list[object], tmp_path: Path) -> None:
    pixels = tissue_pixels(256, 256)
    for slide in ("one", "two"):
        (tmp_path / "tiles" / slide).mkdir(parents=True)
        for y in range(-64, 192, 64):  # as the original's tiler does over the edge
            tile = np.full((64, 64, 3), 255, np.uint8) if y < 0 else pixels[y : y + 64, :64]
            Image.fromarray(tile).save(tmp_path / "tiles" / slide / f"{0:05d}x_{y + 40:05d}y.png")
    result = invoke(tmp_path / "tiles", "--output", tmp_path / "out", *encoders)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out" / "slide_embeddings.npz") as table:
        assert table["slides"].tolist() == ["one", "two"]
        assert np.array_equal(*table["features"])
    (path,) = (tmp_path / "out" / "features").rglob("one.h5")
    assert read_features(path)[1].tolist() == [[0, -24], [0, 40], [0, 104], [0, 168]]
    broken = tmp_path / "tiles" / "two" / "00000x_00040y.png"
    broken.write_bytes(broken.read_bytes()[:50])
    result = invoke(tmp_path / "tiles" / "two", "--output", tmp_path / "two", *encoders)
    assert result.exit_code == 3
    assert "Wrote 1 slide to" in result.output and "1: tiles that cannot be read" in result.output


def test_real_slide(encoders: list[object], tmp_path: Path) -> None:
    slide = real_file("slides/small_HE.svs")
    result = invoke(slide, "--output", tmp_path / "out", *encoders[:-4], "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out" / "features").rglob("small_HE.h5")
    features, _ = read_features(path)
    assert len(features) > 40 and np.isfinite(features).all()


def test_wrong_use(encoders: list[object], tmp_path: Path) -> None:
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(300, 300), mpp=0.5)
    out = ["--output", tmp_path / "out"]
    for arguments, message in (
        ([tmp_path / "none.svs", *out, *encoders], "no such file or folder"),
        ([slide, *out, *encoders[:4]], "width 48"),
        ([slide, *out, "--tile-encoder", tmp_path], "neither model.safetensors nor"),
        ([slide, *out, *encoders, "--grid-px", "0"], "0 is not in the range"),
        ([slide, *out, *encoders, "--patch-px", "0"], "patch_px"),
        ([slide, *out, *encoders, "--preset", "best"], "'best' is not one of"),
    ):
        result = invoke(*arguments)
        assert result.exit_code in (1, 2) and message in result.output, result.output
        assert "Traceback" not in result.output
    (tmp_path / "empty").mkdir()
    result = invoke(tmp_path / "empty", *out, *encoders)
    assert "neither a slide nor a tile like 01581x_25327y.png" in result.output
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_another_house_stops_at_the_tiles(tmp_path: Path) -> None:
    save_open_clip(tmp_path / "clip")
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(600, 500), mpp=0.5)
    out = tmp_path / "out"
    result = invoke(slide, "--output", out, "--tile-encoder", tmp_path / "clip", "--no-pictures")
    assert result.exit_code == 0, result.output
    assert "No slide encoder was trained on" in result.output
    (path,) = (out / "features").rglob("s.h5")
    features, _ = read_features(path)
    assert features.shape == (2, 16)  # two whole tiles of 256 px fit
    assert not (out / "slide_features").exists()
    result = invoke(slide, "--output", out, "--tile-encoder", "uni2h")
    assert result.exit_code in (1, 2) and "did you mean uni2-h" in result.output


def test_unknown_architectures_are_wrong_usage(tmp_path: Path) -> None:
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(300, 300), mpp=0.5)
    arguments = (slide, "--output", tmp_path / "out", "--tile-encoder", "random")
    result = invoke(*arguments, "--tile-arch", "vit_smal_patch16_224")
    assert result.exit_code == 2 and "did you mean vit_small_patch16_224" in result.output
    result = invoke(
        *arguments, "--tile-arch", "resnet18", "--slide-encoder", "random", "--slide-arch", "tiny"
    )
    assert result.exit_code == 2 and "no architecture 'tiny'" in result.output
    assert not (tmp_path / "out").exists()
