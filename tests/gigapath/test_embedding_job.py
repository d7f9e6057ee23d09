"""Embedding many slides: outputs, and that kills, workers and Ray do not change them."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from gigapath.embed.job import EmbeddingSettings, Placement, embed_slides
from gigapath.embed.slide_encoders import NamedSlideEncoder, origin_of_file
from gigapath.embed.slide_vectors import describe_slide_encoder, open_slide_encoder
from gigapath.embed.tile_inference import describe_encoder
from gigapath.slide_encoder import ARCHITECTURES, register_architecture
from pathcore.encoders import create_encoder
from pathcore.encoders.origin import TileOrigin
from pathcore.files import sha256_of
from tests.gigapath.tiny_encoders import write_tile_encoder
from tests.killing import finishes
from tests.pathcore.encoders.tiny_presets import tiny_uni
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.conform import read_feature_file
from wsi.features import EmbeddingError
from wsi.reader import Region, Slide
from wsi.store import read_attributes, read_coordinates, read_features
from wsi.tiling import PatchSpec

ROOT = Path(__file__).parents[2]
ARCH = "tiny_job_slide_enc12l"
register_architecture(
    ARCH, embed_dim=32, depth=12, num_heads=4, segment_lengths=(8, 16, 32, 64, 128)
)
PLACEMENT = Placement("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    write_svs(folder / "slides" / "a.svs", tissue_pixels(500, 420, blank=0.3), mpp=0.25)
    write_svs(folder / "slides" / "b.svs", tissue_pixels(330, 300, seed=1), mpp=0.5)
    write_tile_encoder(folder / "enc")
    return folder


def settings_of(folder: Path, preset: str = "mean", **changes: Any) -> EmbeddingSettings:
    slide_encoder = describe_slide_encoder(
        "random", 48, model_arch=ARCH, preset=preset, grid_px=changes.pop("grid_px", None)
    )
    return EmbeddingSettings(
        describe_encoder(str(folder / "enc")),
        slide_encoder,
        PatchSpec(32, 0.5, min_tissue=0.1),
        **{"batch_size": 8, "pictures": False, **changes},
    )


def vector_of(out: Path, name: str) -> tuple[np.ndarray, dict[str, Any]]:
    (path,) = out.glob(f"slide_features/*/{name}.h5")
    with h5py.File(path, "r") as file:
        return np.asarray(file["features"]), dict(file["features"].attrs)


def digests(out: Path) -> dict[str, str]:
    kept = (p for p in out.rglob("*") if p.is_file() and ".job" not in p.parts)
    return {path.relative_to(out).as_posix(): sha256_of(path) for path in kept}


@pytest.mark.parametrize(
    ("preset", "layer", "pooling", "cell"),
    [
        ("pipeline", 12, "cls", 256),
        ("trident", 11, "mean", 64),
        ("lazyslide", "final", "cls", 256),
        ("mean", "final", "mean", 64),
    ],
)
def test_vectors_say_what_they_are(
    folder: Path, tmp_path: Path, preset: str, layer: Any, pooling: str, cell: int
) -> None:
    settings = settings_of(folder, preset)
    slide = folder / "slides" / "a.svs"
    assert embed_slides(slide, tmp_path / "out", settings, PLACEMENT, progress=False).written == 1
    (path,) = (tmp_path / "out" / "features").glob("enc-*/a.h5")
    features, coords = read_features(path)
    assert np.array_equal(coords, coords[np.lexsort(coords.T)])
    assert settings.slide_encoder is not None
    model = open_slide_encoder(settings.slide_encoder)
    model.tile_size = cell
    with torch.no_grad():
        x, places = torch.from_numpy(features)[None], torch.from_numpy(coords)[None]
        expected = model.embed(x, places, layer, pooling)[0].numpy()  # type: ignore[arg-type]
    vector, attributes = vector_of(tmp_path / "out", "a")
    np.testing.assert_allclose(vector, expected, atol=1e-6)
    found = {name: attributes[name] for name in ("preset", "layer", "pooling", "tile_size")}
    assert found == {"preset": preset, "layer": layer, "pooling": pooling, "tile_size": cell}
    assert attributes["num_tiles"] == len(coords) and attributes["size_level0"] == 64
    with np.load(tmp_path / "out" / "slide_embeddings.npz") as table:
        assert table["slides"].tolist() == ["a"]
        assert np.array_equal(table["features"], vector[None])


def test_grid_of_choice(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, grid_px="tile")
    embed_slides(folder / "slides", tmp_path / "out", settings, PLACEMENT, progress=False)
    cells = {name: vector_of(tmp_path / "out", name)[1]["tile_size"] for name in ("a", "b")}
    assert cells == {"a": 64, "b": 32}


@pytest.mark.multiproc
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_processes_and_pictures_change_nothing(
    folder: Path, tmp_path: Path, start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context(start_method)

    def run(name: str, workers: int, pictures: bool, placement: Placement = PLACEMENT) -> Any:
        settings = settings_of(folder, pictures=pictures)
        embed_slides(
            folder / "slides",
            tmp_path / name,
            settings,
            placement,
            workers=workers,
            progress=False,
        )
        return digests(tmp_path / name)

    one = run("one", 1, False)
    assert {Path(name).parts[0] for name in one} == {
        *("coords", "features", "slide_features", "slide_embeddings.npz"),
        *("manifest.jsonl", "skipped.jsonl", "report.json"),
    }
    monkeypatch.setattr("pathcore.pool._context", lambda: context)
    two = run("two", 2, True)
    assert one.items() <= two.items()
    pictures = {name for name in two if name not in one}
    assert pictures == {
        f"{kind}/{name}.jpg"
        for kind in ("overlays", "pictures", "thumbnails")
        for name in ("a", "b")
    }


@pytest.mark.slow
@pytest.mark.multiproc
def test_ray_changes_nothing(folder: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    settings = EmbeddingSettings(
        describe_encoder(str(folder / "enc")), None, PatchSpec(32, 0.5), pictures=False
    )

    def embed(engine: Any) -> None:
        embed_slides(
            folder / "slides",
            tmp_path / engine,
            settings,
            PLACEMENT,
            workers=1,
            engine=engine,
            progress=False,
        )

    embed("process")
    # In a process of its own: see `test_ray_writes_the_same_bytes` of tests/wsi/test_extraction.py.
    assert finishes(lambda: embed("ray"), kill_after_s=None)
    assert digests(tmp_path / "ray") == digests(tmp_path / "process")


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize(("workers", "kills"), [(1, 4), (2, 3)])
def test_killed_again_and_again(tmp_path: Path, workers: int, kills: int) -> None:
    for number in range(3):
        path = tmp_path / "slides" / f"s{number}.svs"
        write_svs(path, tissue_pixels(420, 330, seed=number), mpp=0.5)
    job = {
        "slides": str(tmp_path / "slides"),
        "tile_encoder": str(write_tile_encoder(tmp_path / "enc", depth=1)),
        "root": str(tmp_path),
        "workers": workers,
        "kills": kills,
        "seed": kills,
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.gigapath.embedding_killer", json.dumps(job)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    words = result.stdout.split()
    assert int(words[words.index("KILLS") + 1]) >= kills
    assert int(words[words.index("WITH_PARTS") + 1]) > 0  # some kills fell between parts


def test_coordinates_are_checked_before_the_tiles_are_embedded(
    folder: Path, tmp_path: Path
) -> None:
    from gigapath.embed.slide_vectors import check_slide, slide_vector

    settings = settings_of(folder)
    spec = settings.slide_encoder
    assert spec is not None
    far = np.array([[0, 0], [256_000, 0]], np.int64)
    with pytest.raises(EmbeddingError, match="s: coords: tile 1 lies at x=256000"):
        check_slide(far, 64, spec, "s")
    x, y = np.meshgrid(np.arange(12), np.arange(12))
    numbers = np.stack([x.ravel(), y.ravel()], 1).astype(np.int64)  # of tiles, not of pixels
    with pytest.raises(EmbeddingError, match="expected pixels at level 0"):
        check_slide(numbers, 64, spec, "s")
    model = open_slide_encoder(spec)
    for features, coords, message in (
        (np.zeros((2, 40)), far[:1].repeat(2, 0), "of width 40; the slide encoder takes 48"),
        (np.zeros((2, 48)), far[:1], "2 features, 1 coordinates"),
        (np.zeros((0, 48)), far[:0], "no tiles"),
        (np.full((1, 48), np.nan), far[:1], "not finite"),
    ):
        with pytest.raises(EmbeddingError, match=message):
            slide_vector(model, features, coords, 64, spec, "s")


def test_encoders_that_do_not_go_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tile embeddings of width 48"):
        describe_slide_encoder("random", 48)
    with pytest.raises(ValueError, match="preset 'median'"):
        describe_slide_encoder("random", 48, model_arch=ARCH, preset="median")
    monkeypatch.setitem(ARCHITECTURES, "tiny_job_2", {"embed_dim": 32, "depth": 2, "num_heads": 4})
    with pytest.raises(ValueError, match="takes layer 12, tiny_job_2 has 2"):
        describe_slide_encoder("random", 48, model_arch="tiny_job_2", preset="pipeline")
    with pytest.raises(FileNotFoundError, match="none"):
        describe_slide_encoder(str(folder / "none"), 1536)
    assert describe_slide_encoder("random", 384).model_arch == "gigapath_slide_enc12l384d"


@pytest.fixture
def tiny_preset(tmp_path: Path) -> Iterator[str]:
    with tiny_uni(tmp_path) as name:
        yield name


@pytest.mark.parametrize("kind", ["preset", "open_clip", "hf"])
def test_encoders_by_name_give_their_own_features(
    folder: Path, tiny_preset: str, tmp_path: Path, kind: str
) -> None:
    if kind == "preset":
        name = tiny_preset
    else:
        save = {"open_clip": save_open_clip, "hf": save_hugging_face}[kind]
        name = str(save(tmp_path / "clip")) if kind == "hf" else str(tmp_path / "clip")
        if kind == "open_clip":
            save(tmp_path / "clip")
    spec = describe_encoder(name)
    assert (spec.patch_px, spec.mpp) == ((40, 1.0) if kind == "preset" else (256, 0.5))
    settings = EmbeddingSettings(spec, None, PatchSpec(40, 0.5), batch_size=8, pictures=False)
    slide = folder / "slides" / "b.svs"
    assert embed_slides(slide, tmp_path / "out", settings, PLACEMENT, progress=False).written == 1
    (path,) = (tmp_path / "out" / "features").rglob("b.h5")
    features, coords = read_features(path)
    encoder = create_encoder(name, device="cpu")
    with Slide(slide) as opened:
        images = [Image.fromarray(opened.read(Region(int(x), int(y), 40, 40))) for x, y in coords]
    batches = [encoder.features(images[n : n + 8]) for n in range(0, len(images), 8)]
    assert np.array_equal(features, torch.cat(batches).numpy())  # to the bit
    attributes = read_attributes(path)
    described = encoder.describe()
    assert attributes["encoder_name"] == described["encoder"]
    assert attributes["weights_sha256"] == attributes["encoder_digest"] == described["digest"]
    assert json.loads(attributes["transform"]) == described["transform"]
    assert attributes["precision"] == "float32" and attributes["feature"] == described["feature"]
    assert json.loads(attributes["encoder_mpp"]) == described["mpp"]
    # Those of the tiles, whatever the encoder was made for:
    origin = origin_of_file(read_feature_file(path))
    assert (origin.patch_px, origin.mpp) == (40, 0.5)
    assert read_coordinates(path).size_level0 == 40


def test_tiles_of_another_scan_are_not_embedded(folder: Path, tmp_path: Path) -> None:
    first = replace(settings_of(folder), slide_encoder=None)
    assert embed_slides(folder / "slides", tmp_path / "first", first, PLACEMENT).written == 2
    write_svs(tmp_path / "slides" / "a.svs", tissue_pixels(1000, 840, blank=0.3), mpp=0.125)
    shutil.copy(folder / "slides" / "b.svs", tmp_path / "slides")
    settings = replace(first, coords=str(tmp_path / "first" / "coords"))
    report = embed_slides(tmp_path / "slides", tmp_path / "out", settings, PLACEMENT)
    assert (report.written, report.reasons) == (1, {"coordinates of another slide": 1})


def test_features_of_tiles_placed_elsewhere_say_their_resolution(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "coords").mkdir()
    with h5py.File(tmp_path / "coords" / "b_patches.h5", "w") as file:
        file["coords"] = np.array([[0, 0], [64, 0]])
        file["coords"].attrs.update({"patch_size": 32, "patch_size_level0": 64})  # TRIDENT's
    settings = settings_of(folder, coords=str(tmp_path / "coords"))
    slide = folder / "slides" / "b.svs"
    assert embed_slides(slide, tmp_path / "out", settings, PLACEMENT, progress=False).written == 1
    (path,) = (tmp_path / "out" / "features").rglob("b.h5")
    found = read_feature_file(path)
    assert (found.mpp, found.mpp_level0, found.patch_px) == (1.0, 0.5, 32)


def test_the_name_of_an_encoder_stands_for_its_published_tiles(
    folder: Path, tmp_path: Path, tiny_preset: str
) -> None:
    slide = folder / "slides" / "b.svs"
    report = embed_slides(slide, tmp_path / "out", tiny_preset, PLACEMENT, progress=False)
    assert report.written == 1
    (path,) = (tmp_path / "out" / "features").rglob("b.h5")
    assert read_attributes(path)["patch_size"] == 40
    assert read_attributes(tmp_path / "out/coords/b.h5")["mpp"] == 1.0
    assert (tmp_path / "out/pictures/b.jpg").is_file()
    settings = EmbeddingSettings.for_encoder(tiny_preset, slide_mpp=0.25)
    assert settings.spec == PatchSpec(40, 1.0, min_tissue=0.1) and settings.slide_mpp == 0.25


def test_slide_encoders_by_name_check_the_tiles(folder: Path, tmp_path: Path) -> None:
    slide = folder / "slides" / "b.svs"

    def run(name: str, encoder: str, spec: PatchSpec) -> Path:
        settings = EmbeddingSettings(
            describe_encoder(str(folder / "enc")),
            NamedSlideEncoder(encoder),
            spec,
            batch_size=8,
            pictures=False,
            origin=TileOrigin("chief-ctp"),
        )
        embed_slides(slide, tmp_path / name, settings, PLACEMENT, progress=False)
        return tmp_path / name

    mean = run("mean", "mean", PatchSpec(32, 0.5))
    (path,) = mean.glob("features/*/b.h5")
    with h5py.File(mean / "slide_features/mean/b.h5") as file:
        np.testing.assert_allclose(file["features"], read_features(path)[0].mean(0), atol=1e-6)
        assert file["features"].attrs["slide_encoder"] == "mean"
    chief = run("chief", "chief", PatchSpec(32, 0.5))
    (row,) = map(json.loads, (chief / "skipped.jsonl").open())
    assert "features of chief-ctp, 32 px at 0.5 µm" in row["detail"]
    assert "trained on chief-ctp, 256 px at 1 µm" in row["detail"]
    assert not (chief / "features").exists()  # refused before hours go into tiles


def test_names_that_are_no_encoder() -> None:
    with pytest.raises(ValueError, match="did you mean uni2-h"):
        describe_encoder("uni2h")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        describe_encoder("weights/of/nobody")
