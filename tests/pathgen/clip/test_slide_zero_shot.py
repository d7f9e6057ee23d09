from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from pathcore.encoders import Encoder, create_encoder
from pathcore.image_sets import ImageSet, load_image_set
from pathcore.rows import write_csv
from pathgen.clip.slide_zero_shot import pool_top_k, slide_zero_shot
from pathgen.clip.zero_shot import class_features, prompt_features
from tests.pathgen.tiny_encoders import save_open_clip
from tests.wsi.qupath import read_valid
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import Slide
from wsi.store import read_features, write_coordinates, write_features
from wsi.tiling import PatchSpec, tile
from xtuner_add.cli import main

CLASSES = ("tumour", "stroma")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_open_clip(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="module")
def encoder(spec: str) -> Encoder:
    return create_encoder(spec, device="cpu")


@pytest.fixture
def benchmark(tmp_path: Path) -> ImageSet:
    content = {"name": "kinds", "classes": [{"name": n, "prompts": [n]} for n in CLASSES]}
    (tmp_path / "kinds.json").write_text(json.dumps(content))
    return load_image_set(tmp_path / "kinds.json", "prompts")


def write_slides(folder: Path, encoder: Encoder, benchmark: ImageSet) -> dict[str, str]:
    """Slides of noise in which two of ten patches show the class, and one shows the other."""
    classes = class_features(prompt_features(encoder, benchmark)).numpy()
    generator, labels = np.random.default_rng(0), {}
    coords = np.array([[256 * (n % 5), 256 * (n // 5)] for n in range(10)])
    folder.mkdir()
    for number in range(8):
        own = number % 2
        vectors = generator.normal(size=(10, 16)).astype(np.float32)
        # Noise that no prompt resembles, so that only the planted patches matter.
        vectors -= vectors @ np.linalg.pinv(classes) @ classes
        vectors[[3, 7]] = classes[own] * 5
        vectors[5] = classes[1 - own] * 5
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        attributes = {"patch_size_level0": 256, "weights_sha256": encoder.digest}
        write_features(folder / f"S{number}.h5", vectors, coords, encoder="clip",
                       attributes=attributes)  # fmt: skip
        labels[f"S{number}"] = CLASSES[own]
    return labels


def test_pooling_is_the_mean_of_the_k_highest() -> None:
    similarities = np.array([[0.1, 0.8], [0.7, 0.2], [0.4, 0.6]])
    assert pool_top_k(similarities, 1).tolist() == [0.7, 0.8]
    np.testing.assert_allclose(pool_top_k(similarities, 2), [0.55, 0.7])
    np.testing.assert_allclose(pool_top_k(similarities, 99), similarities.mean(axis=0))


def test_planted_patches_decide(encoder: Encoder, benchmark: ImageSet, tmp_path: Path) -> None:
    labels = write_slides(tmp_path / "features", encoder, benchmark)
    vectors, coords = read_features(tmp_path / "features/S0.h5")
    bad = {"wide": vectors[:, :3], "other": vectors}
    for name, own in bad.items():
        attributes = {"weights_sha256": "0" * 64} if name == "other" else {}
        write_features(tmp_path / f"features/{name}.h5", own, coords, encoder="x",
                       attributes=attributes)  # fmt: skip
    metrics = slide_zero_shot(
        encoder, benchmark, tmp_path / "features", tmp_path / "out", ks=(1, 2),
        labels={**labels, "gone": "tumour"}, map_formats=("png", "geojson", "ome-tiff"),
    )  # fmt: skip
    assert metrics["top_k"]["2"]["balanced_accuracy"]["value"] == 1.0
    assert metrics["num_labelled"] == 8 and metrics["num_skipped"] == 3
    skipped = map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    reasons = {row["id"]: row["reason"] for row in skipped}
    assert "no file of features" in reasons["gone"] and "of weights 000000" in reasons["other"]
    assert "projected and of length 1" in reasons["wide"]
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    row = next(row for row in rows if row["id"] == "S1" and row["k"] == "2")
    classes = class_features(prompt_features(encoder, benchmark)).numpy()
    vectors, coords = read_features(tmp_path / "features/S1.h5")
    similarities = vectors @ classes.T
    for column, name in zip(similarities.T, CLASSES, strict=True):
        assert float(row[name]) == pytest.approx(np.sort(column)[-2:].mean(), abs=1e-5)
    assert row["predicted"] == row["true"] == "stroma"

    squares = read_valid(tmp_path / "out/maps/S1.geojson")
    found = [square["properties"]["measurements"]["stroma"] for square in squares]
    np.testing.assert_allclose(found, similarities[:, 1], atol=1e-5)
    with tifffile.TiffFile(tmp_path / "out/maps/S1.ome.tif") as tiff:
        assert tiff.series[0].shape == (2, 16, 40)
    with Image.open(tmp_path / "out/maps/S1.png") as picture:
        assert picture.width > picture.height

    # The same folder with other prompts gets other maps.
    others = [replace(c, prompts=(f"no {c.name}",)) for c in benchmark.classes]
    slide_zero_shot(
        encoder, replace(benchmark, classes=tuple(others)), tmp_path / "features",
        tmp_path / "out", map_formats=("geojson",),
    )  # fmt: skip
    again = read_valid(tmp_path / "out/maps/S1.geojson")
    assert [square["properties"] for square in again] != [s["properties"] for s in squares]


def test_features_before_the_projection_are_refused(
    encoder: Encoder, benchmark: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_slides(tmp_path / "features", encoder, benchmark)
    vectors, coords = read_features(tmp_path / "features/S0.h5")
    (tmp_path / "raw").mkdir()
    write_features(tmp_path / "raw/S0.h5", 3 * vectors, coords, encoder="clip")
    slide_zero_shot(encoder, benchmark, tmp_path / "raw", tmp_path / "out")
    monkeypatch.setattr(type(encoder), "features_are_joint", False)
    with pytest.raises(ValueError, match=r"length 3;.*projected and of length 1"):
        slide_zero_shot(encoder, benchmark, tmp_path / "raw", tmp_path / "out")
    with pytest.raises(ValueError, match="label 'fat': no class of kinds"):
        slide_zero_shot(encoder, benchmark, tmp_path / "raw", tmp_path / "out",
                        labels={"S0": "fat"})  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"no files SLIDE\.h5"):
        slide_zero_shot(encoder, benchmark, tmp_path, tmp_path / "out")


def test_features_of_another_encoder_are_refused(
    encoder: Encoder, benchmark: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRIDENT stores them: of equal width, with a name and without a digest."""
    write_slides(tmp_path / "features", encoder, benchmark)
    vectors, coords = read_features(tmp_path / "features/S0.h5")
    (tmp_path / "others").mkdir()
    with h5py.File(tmp_path / "others/S0.h5", "w") as file:
        file.create_dataset("features", data=vectors).attrs["encoder"] = "conch_v1"
        file.create_dataset("coords", data=coords).attrs["patch_size_level0"] = 256
    monkeypatch.setattr(encoder, "name", "plip")
    with pytest.raises(ValueError, match=r"S0\.h5: of conch, expected those of plip"):
        slide_zero_shot(encoder, benchmark, tmp_path / "others", tmp_path / "out")


def test_tables_of_labels_are_checked(
    encoder: Encoder, benchmark: ImageSet, tmp_path: Path
) -> None:
    labels = write_slides(tmp_path / "features", encoder, benchmark)
    rows = [[f"{slide}.svs", f" {label} "] for slide, label in labels.items()]
    table = tmp_path / "labels.csv"
    write_csv(table, ["slide_id", "label"], [*rows[1:], rows[1], ["S0"]])
    metrics = slide_zero_shot(
        encoder, benchmark, tmp_path / "features", tmp_path / "out", labels=table
    )
    assert (metrics["num_slides"], metrics["num_labelled"], metrics["num_skipped"]) == (8, 7, 2)
    skipped = map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    reasons = [row["reason"].partition("labels.csv")[2] for row in skipped]
    assert reasons == [":9: named twice, first in line 2", ":10: no label"]
    write_csv(table, ["slide_id", "label"], [["S1.ndpi", CLASSES[0]]])
    with pytest.raises(ValueError, match=r"slides such as S1\.ndpi, and files such as S0\.h5"):
        slide_zero_shot(encoder, benchmark, tmp_path / "features", tmp_path / "out", labels=table)
    write_csv(table, ["slide_id", "label"], [*rows, ["S1", CLASSES[0]]])
    with pytest.raises(ValueError, match=r"labels\.csv:10: S1: label 'tumour', but 'stroma' in"):
        slide_zero_shot(encoder, benchmark, tmp_path / "features", tmp_path / "out", labels=table)


def test_command_embeds_slides_first(spec: str, benchmark: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "coords").mkdir()
    path = write_svs(tmp_path / "slides/a.svs", tissue_pixels(512, 512, seed=0))
    with Slide(path) as slide:
        write_coordinates(tmp_path / "coords/a.h5", slide, tile(slide, PatchSpec(64, 0.5)))
    write_csv(tmp_path / "labels.csv", ["slide_id", "label"], [["a", "tumour"], ["b", "stroma"]])
    words = [
        "clip-zero-shot-slides", spec, tmp_path / "coords", "--slides", tmp_path / "slides",
        "--benchmark", tmp_path / "kinds.json", "--labels", tmp_path / "labels.csv",
        "--output", tmp_path / "out", "--k", "1", "--k", "3", "--map-format", "png",
        "--device", "cpu",
    ]  # fmt: skip
    found = CliRunner().invoke(main, list(map(str, words)))
    assert found.exit_code == 3, found.output
    assert "balanced accuracy, k = 3" in found.output and "1 skipped" in found.output
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert [(row["id"], row["k"]) for row in rows] == [("a", "1"), ("a", "3")]
    assert (tmp_path / "out/maps/a.png").is_file()
    [file] = (tmp_path / "out/features").glob("*/a.h5")
    vectors, _ = read_features(file)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)
    again = CliRunner().invoke(
        main, [*map(str, [*words[:2], file.parent, *words[5:]]), "--output", str(tmp_path / "b")]
    )
    assert again.exit_code == 3, again.output
    assert (tmp_path / "b/predictions.csv").read_text() == (
        tmp_path / "out/predictions.csv"
    ).read_text()
