"""The original's pipeline functions, run as its notebook runs them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gigapath.pipeline as pipeline
from gigapath import slide_encoder as slide_encoders
from gigapath.pipeline import (
    TileEncodingDataset,
    load_tile_encoder_transforms,
    load_tile_slide_encoder,
    run_inference_with_slide_encoder,
    run_inference_with_tile_encoder,
    tile_one_slide,
)
from gigapath.preprocessing.data.slide_utils import find_level_for_target_mpp
from gigapath.slide_encoder import LongNetViT
from tests.gigapath.tiny_encoders import write_tile_encoder
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import SlideError

ARCH = "tiny_pipeline_slide_enc12l"
slide_encoders.register_architecture(
    ARCH, embed_dim=32, depth=12, num_heads=4, segment_lengths=(8, 16, 32, 64, 128)
)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    slide = write_svs(folder / "s.svs", tissue_pixels(900, 700, blank=0.2), mpp=0.5)
    return tile_one_slide(slide, folder / "out", tile_size=64, progress=False)


@pytest.fixture
def encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.nn.Module, torch.nn.Module]:
    monkeypatch.setattr(pipeline, "SLIDE_ARCHITECTURE", ARCH)
    monkeypatch.setattr(pipeline, "TILE_WIDTH", 48)
    torch.manual_seed(0)
    model = slide_encoders.create_model("", ARCH, 48)
    torch.save({"model": model.state_dict()}, tmp_path / "slide_encoder.pth")
    folder = write_tile_encoder(tmp_path / "tile_encoder")
    return load_tile_slide_encoder(str(folder), str(tmp_path / "slide_encoder.pth"))


def test_notebook(tiles: Path, encoders: tuple[torch.nn.Module, LongNetViT]) -> None:
    tile_encoder, slide_encoder_model = encoders
    image_paths = [os.path.join(tiles, name) for name in os.listdir(tiles) if name.endswith(".png")]
    outputs = run_inference_with_tile_encoder(image_paths, tile_encoder, batch_size=7)
    assert outputs["tile_embeds"].shape == (len(image_paths), 48)
    assert outputs["coords"].dtype == torch.float32
    slide_embeds = run_inference_with_slide_encoder(
        slide_encoder_model=slide_encoder_model, **outputs
    )
    names = [f"layer_{number}_embed" for number in range(13)]
    assert list(slide_embeds) == [*names, "last_layer_embed"]
    assert all(vector.shape == (1, 32) for vector in slide_embeds.values())
    assert torch.equal(slide_embeds["last_layer_embed"], slide_embeds["layer_12_embed"])
    with torch.no_grad():
        order = np.lexsort(outputs["coords"].numpy().T)
        # The grid begins outside the slide, at y = -2; the slide encoder would refuse that.
        assert outputs["coords"].amin(0).tolist() == [156, -2]
        places = outputs["coords"][order] + torch.tensor([0, 2])
        layers = slide_encoder_model(outputs["tile_embeds"][order], places, all_layer_embed=True)
    torch.testing.assert_close(slide_embeds["layer_5_embed"], layers[5])


def test_embeddings_of_images_as_the_original_computes_them(
    tiles: Path, encoders: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    """Images in the order given, one by one through the published transform."""
    paths = sorted(tiles.glob("*.png"), reverse=True)[:6]
    Image.open(paths[0]).resize((50, 90)).save(tiles / "00001x_00002y.png")
    paths.append(tiles / "00001x_00002y.png")
    found = run_inference_with_tile_encoder(paths, encoders[0], 4, progress=False)
    transform = pipeline.tile_transform(32)
    for number, path in enumerate(paths):
        with torch.no_grad():
            expected = encoders[0](transform(Image.open(path).convert("RGB"))[None])[0]
        torch.testing.assert_close(found["tile_embeds"][number], expected, atol=1e-5, rtol=1e-5)
        x, y = (int(part[:-1]) for part in path.stem.split("_"))
        assert found["coords"][number].tolist() == [x, y]
    assert load_tile_encoder_transforms()(Image.open(paths[-1])).shape == (3, 224, 224)
    paths[-1].unlink()


def test_tile_dataset_of_the_original(
    tiles: Path, encoders: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    paths = sorted(tiles.glob("*.png"))
    dataset = TileEncodingDataset([str(p) for p in paths], load_tile_encoder_transforms())
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=len(paths))))
    ours = run_inference_with_tile_encoder(paths, encoders[0], device="cpu", progress=False)
    assert batch["img"].shape == (len(paths), 3, 224, 224)
    assert torch.equal(batch["coords"], ours["coords"])
    plain = TileEncodingDataset(paths)[0]
    assert plain["img"].shape == (64, 64, 3) and plain["img"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"name\.png"):
        TileEncodingDataset(["name.png"])


def test_level_of_a_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = write_svs(tmp_path / "s.svs", tissue_pixels(900, 700), mpp=0.25, downsamples=(2, 4))
    levels = [find_level_for_target_mpp(str(slide), mpp) for mpp in (0.25, 0.52, 1.0, 2.0)]
    assert levels == [0, 1, 2, None]
    assert "No level has about 2 micrometres" in capsys.readouterr().out
    unknown = write_svs(tmp_path / "u.svs", tissue_pixels(900, 700), mpp=None, magnification=None)
    assert find_level_for_target_mpp(unknown, 0.5) is None


def test_order_of_the_tiles(tiles: Path, encoders: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    outputs = run_inference_with_tile_encoder(
        sorted(tiles.glob("*.png")), encoders[0], progress=False
    )
    shuffled = torch.randperm(len(outputs["coords"]), generator=torch.Generator().manual_seed(1))
    mixed = {name: tensor[shuffled] for name, tensor in outputs.items()}
    run = run_inference_with_slide_encoder
    expected = run(**outputs, slide_encoder_model=encoders[1])["last_layer_embed"]
    found = run(**mixed, slide_encoder_model=encoders[1])["last_layer_embed"]
    torch.testing.assert_close(found, expected)
    given = run(**mixed, slide_encoder_model=encoders[1], order="given")["last_layer_embed"]
    assert (given - expected).abs().max() > 1e-4
    batch = {name: torch.stack([outputs[name], mixed[name]]) for name in outputs}
    both = run(**batch, slide_encoder_model=encoders[1])["last_layer_embed"]
    torch.testing.assert_close(both, expected.expand(2, -1))


def test_mean_instead_of_class_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SLIDE_ARCHITECTURE", ARCH)
    monkeypatch.setattr(pipeline, "TILE_WIDTH", 48)
    torch.save(slide_encoders.create_model("", ARCH, 48).state_dict(), tmp_path / "s.pth")
    folder = write_tile_encoder(tmp_path / "t")
    _, model = load_tile_slide_encoder(str(folder), str(tmp_path / "s.pth"), global_pool=True)
    assert model.global_pool is True


def test_what_cannot_be_run(
    tiles: Path, tmp_path: Path, encoders: tuple[torch.nn.Module, torch.nn.Module]
) -> None:
    embed_slide = run_inference_with_slide_encoder
    embeds, coords = torch.zeros(5, 48), torch.zeros(5, 2)
    coords[:, 0] = 256 * torch.arange(5)
    for arguments, message in (
        ((embeds, coords[:4]), r"\(1, 4, 2\): expected \(1, 5, 2\)"),
        ((embeds[:, :40], coords), "expected .*48"),
        ((torch.full_like(embeds, float("nan")), coords), "not finite"),
        ((embeds, coords - 300), "lies at x=-300"),
        ((embeds, coords * 1000), "expected pixels at level 0"),
        ((embeds[:0], coords[:0]), "no tiles"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_slide(*arguments, encoders[1])
    with pytest.raises(ValueError, match="order 'random'"):
        embed_slide(embeds, coords, encoders[1], order="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images given"):
        run_inference_with_tile_encoder([], encoders[0])
    (tmp_path / "1x_2y.png").write_bytes(b"half")
    with pytest.raises(SlideError, match=r"1x_2y\.png: cannot be read"):
        run_inference_with_tile_encoder([tmp_path / "1x_2y.png"], encoders[0], progress=False)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_tile_slide_encoder(str(tmp_path / "none"))
