"""Tile encoders: the original's topology and transform, weights, the published snippet."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from gigapath import tile_encoder
from gigapath.embed.tile_inference import TileEncoder, choose_precision, describe_encoder
from gigapath.tile_encoder import ARCHITECTURES, create_model, resize_px, tile_transform
from pathcore.encoders import get_preset
from pathcore.weights import CheckpointError
from tests.gigapath.tiny_encoders import (
    config,
    tiny_model,
    write_hub_cache,
    write_tile_encoder,
)
from wsi.features import Resize, fit

GOLDEN = Path(__file__).parents[1] / "golden" / "gigapath" / "tile_encoder"
FACTS = json.loads((GOLDEN / "tile_encoder.json").read_text())
REAL = load_file(GOLDEN / "real_weights_prov_normal_000_1.safetensors")
WEIGHTS_VARIABLE = "GIGAPATH_TILE_ENCODER"
"""Names the folder of the released weights, for those who have them."""

SNIPPET = """
import timm
from PIL import Image
from torchvision import transforms
import torch

# Older versions of timm have compatibility issues. Please ensure that you use a newer version by running the following command: pip install timm>=1.0.3.
tile_encoder = timm.create_model("hf_hub:prov-gigapath/prov-gigapath", pretrained=True)

transform = transforms.Compose(
    [
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
)

img_path = "images/prov_normal_000_1.png"
sample_input = transform(Image.open(img_path).convert("RGB")).unsqueeze(0)

tile_encoder.eval()
with torch.no_grad():
    output = tile_encoder(sample_input).squeeze()
"""  # noqa: E501


def released_shapes(**changes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of the released names and shapes that take no room: one value each."""
    shapes = {**FACTS["state_dict"], **changes}
    return {name: torch.zeros(()).expand(tuple(shape)) for name, shape in shapes.items()}


def digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def test_published_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = write_tile_encoder(tmp_path / "weights", img_size=224)
    files = {name: made_up / name for name in ("config.json", "pytorch_model.bin")}
    write_hub_cache(tmp_path / "hub", "prov-gigapath/prov-gigapath", files)
    (tmp_path / "images").mkdir()
    Image.fromarray(REAL["input_rgb_u8_128x128"].numpy()).save(
        tmp_path / "images" / "prov_normal_000_1.png"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names: dict[str, Any] = {}
    exec(SNIPPET, names)
    assert names["output"].shape == (48,)
    ours = create_model(tile_encoder.HUB_NAME)
    with torch.no_grad():
        assert torch.equal(ours(names["sample_input"])[0], names["output"])
    assert torch.equal(names["sample_input"], names["transform"](_sample())[None])
    with pytest.raises(FileNotFoundError, match=r"flash: not in the hub's cache.*HF_TOKEN"):
        create_model(tile_encoder.FLASH_HUB_NAME)


def _sample() -> Image.Image:
    return Image.fromarray(REAL["input_rgb_u8_128x128"].numpy())


def test_tiny_topology_gives_the_reference_output(tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "tiny_tile_encoder.safetensors")
    weights = {n.removeprefix("sd."): t for n, t in golden.items() if n.startswith("sd.")}
    save_file(weights, tmp_path / "tiny.safetensors")
    sizes = dict(img_size=64, embed_dim=48, depth=3, num_heads=4)
    model = create_model(tmp_path / "tiny.safetensors", "gigapath_tile_enc_vitg16", **sizes)
    with torch.no_grad():
        torch.testing.assert_close(model(golden["x"]), golden["out"], atol=1e-5, rtol=1e-5)
        tokens = model.forward_features(golden["x"])  # type: ignore[operator]
    torch.testing.assert_close(tokens, golden["tokens_normed"], atol=1e-5, rtol=1e-5)


def test_released_names_and_shapes_load(tmp_path: Path) -> None:
    """All 1.1 billion parameters, in a file of a few KB; the architecture is told by the width."""
    torch.save(released_shapes(), tmp_path / "pytorch_model.bin")
    model = create_model(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == FACTS["params"] == 1_134_953_984
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == FACTS["state_dict"]
    assert model.blocks[0].mlp.act.__class__.__name__ == "SiLU"  # type: ignore[index,union-attr]
    assert not model.training
    assert tile_encoder.embedding_width(str(tmp_path)) == 1536
    (tmp_path / "config.json").write_text(
        json.dumps(config(dict(tile_encoder.ARCHITECTURES["gigapath_tile_enc_vitg16"].model_args)))
    )
    assert len(create_model(tmp_path).state_dict()) == FACTS["n_tensors"]


def test_flash_tile_encoder() -> None:
    model = create_model("", "gigapath_tile_enc_dinov2s")
    assert sum(p.numel() for p in model.parameters()) == 21_681_024
    assert model.blocks[0].mlp.fc1.weight.shape == (2048, 384)  # type: ignore[index,union-attr]
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 384)
    assert tile_encoder.embedding_width("random", "gigapath_tile_enc_dinov2s") == 384


def test_transform_gives_the_reference_tensor() -> None:
    golden = FACTS["transform"][0]
    tensor = tile_transform()(_sample())
    assert digest(tensor.numpy()) == golden["tensor_sha256_f32"]
    pixels = fit(np.asarray(_sample()), Resize(224, 256))
    assert digest(pixels) == golden["u8_after_resize_crop_sha256"]


@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from([14, 28, 33]))
def test_fit_is_torchvisions(width: int, height: int, crop_px: int) -> None:
    from torchvision import transforms

    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    resize, crop = tile_transform(crop_px).transforms[:2]  # type: ignore[attr-defined]
    expected = transforms.Compose([resize, crop])(Image.fromarray(pixels))
    assert np.array_equal(fit(pixels, Resize(crop_px, resize_px(crop_px))), np.asarray(expected))


def test_pixels_are_normalised_as_the_transform_does() -> None:
    encoder = TileEncoder(tiny_model())
    tiles = np.random.default_rng(0).integers(0, 256, (5, 37, 37, 3), np.uint8)
    transform = tile_transform(32)
    expected = encoder.encode_normalised(
        torch.stack([transform(Image.fromarray(t)) for t in tiles])
    )
    found = encoder.encode(np.stack([fit(t, Resize(32, 37)) for t in tiles]))
    assert torch.equal(found, expected)
    assert (encoder.embed_dim, encoder.crop_px) == (48, 32)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_autocast(precision: str) -> None:
    """Matrices converted once give what autocast converts in every batch."""
    tiles = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        expected = tiny_model()(tiles).float()
    encoder = TileEncoder(tiny_model(), precision=precision)
    found = encoder.encode_normalised(tiles)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    exact = TileEncoder(tiny_model()).encode_normalised(tiles)
    assert (torch.nn.functional.cosine_similarity(found, exact) > 0.98).all()
    assert not torch.equal(found, exact)


def test_precision_by_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (choose_precision("auto", cpu), choose_precision("auto", gpu)) == ("fp32", "fp16")
    assert choose_precision("bf16", cpu) == "bf16"
    with pytest.raises(ValueError, match="precision 'int8'"):
        choose_precision("int8", cpu)  # type: ignore[arg-type]


@pytest.mark.parametrize("safetensors", [True, False])
def test_folder_file_and_wrapper(tmp_path: Path, safetensors: bool) -> None:
    folder = write_tile_encoder(tmp_path / "enc", safetensors=safetensors)
    expected = tiny_model()(torch.ones(1, 3, 32, 32))
    file = next(p for p in folder.iterdir() if p.suffix != ".json")
    for source in (folder, file, str(file)):
        assert torch.equal(create_model(source)(torch.ones(1, 3, 32, 32)), expected)
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "enc" / "wrapped.pth")
    assert torch.equal(
        create_model(tmp_path / "enc" / "wrapped.pth")(torch.ones(1, 3, 32, 32)), expected
    )
    spec, other = describe_encoder(str(folder)), describe_encoder(str(file))
    assert spec.digest == other.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert spec.name == f"enc-{spec.digest[:8]}"


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    for name, tensors, message in (
        ("partial", {k: v for k, v in released_shapes().items() if "39" not in k}, "14 missing"),
        ("more", released_shapes(**{"head.weight": (2, 1536)}), r"(?s)1 unexpected.*head\.weight"),
        ("shape", released_shapes(pos_embed=(1, 257, 1536)), r"(?s)1 of another shape.*pos_embed"),
    ):
        torch.save(tensors, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=message):
            create_model(tmp_path / f"{name}.pth")
    torch.save({"encoder.layers.0.x": torch.zeros(1)}, tmp_path / "slide.pth")
    with pytest.raises(CheckpointError, match="weights of a slide encoder"):
        create_model(tmp_path / "slide.pth")
    torch.save({"patch_embed.proj.weight": torch.zeros(7, 3, 1, 1)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"put the config\.json"):
        create_model(tmp_path / "odd.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        create_model(tmp_path / "none.pth")


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


def test_files_that_cannot_be_trusted_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.bin").write_bytes(pickle.dumps({"x": Exploit()}))
    torch.save({"x": Exploit()}, tmp_path / "code.pth")
    whole = tmp_path / "whole.bin"
    torch.save(tiny_model().state_dict(), whole)
    (tmp_path / "half.bin").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "empty.bin").touch()
    for name in ("code.bin", "code.pth", "half.bin", "half.safetensors", "empty.bin"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read as a checkpoint"):
            create_model(tmp_path / name)
    assert not (tmp_path / "exploited").exists()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model"):
        create_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="hub names begin with hf_hub:"):
        create_model("prov-gigapath/prov-gigapath")
    with pytest.raises(ValueError, match="architecture 'vit_gigantic'"):
        create_model("", "vit_gigantic")
    folder = write_tile_encoder(tmp_path / "enc")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON with `architecture`"):
        create_model(folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "of_nobody"}))
    with pytest.raises(ValueError, match=r"config\.json: architecture 'of_nobody'"):
        create_model(folder)


def test_random_weights_are_asked_for_and_repeatable() -> None:
    arguments = dict(model_arch="gigapath_tile_enc_dinov2s")
    one, two, three = (
        TileEncoder.open(describe_encoder("random", seed=seed, **arguments))  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    )
    weights = [e.model.state_dict()["blocks.3.mlp.fc1.weight"] for e in (one, two, three)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert describe_encoder("random", seed=1).name == "random-gigapath_tile_enc_vitg16-1"


def test_any_vit_of_timm(tmp_path: Path) -> None:
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **sizes)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    found = create_model(tmp_path / "w.pth", "vit_base_patch16_224", **sizes)
    assert found(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tiles = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    expected = TileEncoder(tiny_model()).encode(tiles)
    for precision in ("fp32", "bf16", "fp16"):
        encoder = TileEncoder(tiny_model(), device="cuda", precision=precision)
        found = encoder.encode(tiles).cpu()
        assert (torch.nn.functional.cosine_similarity(found, expected) > 0.98).all()


@pytest.mark.slow
def test_released_weights_give_the_released_embedding() -> None:
    if not os.environ.get(WEIGHTS_VARIABLE):
        pytest.skip(f"{WEIGHTS_VARIABLE} does not name the folder of the released weights")
    encoder = TileEncoder(create_model(os.environ[WEIGHTS_VARIABLE]))
    found = encoder.encode_normalised(tile_transform()(_sample())[None])[0]
    torch.testing.assert_close(found, REAL["cls_embedding"], atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("prov-gigapath", "gigapath_tile_enc_vitg16"),
        ("gigapath-flash", "gigapath_tile_enc_dinov2s"),
    ],
)
def test_the_presets_are_the_published_architectures_and_transform(
    name: str, architecture: str
) -> None:
    preset, published = get_preset(name), ARCHITECTURES[architecture]
    assert preset.architecture == published.timm_name
    own = {
        key: value
        for key, value in published.model_args.items()
        if key not in ("num_classes", "in_chans")
    }
    assert dict(preset.arguments) == own
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (300, 280, 3), np.uint8))
    assert preset.transform is not None
    assert torch.equal(preset.transform(image), tile_transform()(image))


def write_timm_folder(folder: Path, name: str, *, cfg: dict[str, Any] | None = None) -> Any:
    """A model as timm itself saves it for the hub; returns its own evaluation transform."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=64)
    model.pretrained_cfg.update(cfg or {}, input_size=(3, 64, 64))
    timm.models.save_for_hf(
        model, str(folder), model_args={"img_size": 64}, safe_serialization=True
    )
    data = timm.data.resolve_data_config({}, model=model)
    return timm.data.create_transform(**data, is_training=False)


@pytest.mark.parametrize(
    ("name", "cfg"),
    [
        ("vit_tiny_patch16_224", {}),  # mean and deviation 0.5, crop_pct 0.9
        ("vit_tiny_patch16_224", {"crop_pct": 1.0, "interpolation": "bilinear"}),
        ("vit_tiny_patch16_224", {"crop_mode": "squash", "mean": (0.7, 0.5, 0.6)}),
    ],
)
def test_any_encoder_comes_with_its_own_transform(
    tmp_path: Path, name: str, cfg: dict[str, Any]
) -> None:
    theirs = write_timm_folder(tmp_path / "enc", name, cfg=cfg)
    spec = describe_encoder(str(tmp_path / "enc"))
    encoder = TileEncoder.open(spec)
    pixels = np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8)
    expected = theirs(Image.fromarray(pixels))
    assert spec.transform is not None
    assert torch.equal(spec.transform(Image.fromarray(pixels)), expected)
    found = encoder.encode(fit(pixels, encoder.resize)[None])
    with torch.inference_mode():
        torch.testing.assert_close(found, encoder.model(expected[None]))
    published = TileEncoder(encoder.model)  # as it was computed before
    other = published.encode(fit(pixels, published.resize)[None])
    assert (other - found).abs().max() > 0.01


def test_prov_gigapath_keeps_the_published_transform(tmp_path: Path) -> None:
    published = tile_encoder.published_transform()
    torch.save(released_shapes(), tmp_path / "pytorch_model.bin")
    assert describe_encoder(str(tmp_path)).transform == published
    released = dict(tile_encoder.ARCHITECTURES["gigapath_tile_enc_vitg16"].model_args)
    (tmp_path / "config.json").write_text(json.dumps(config(released)))
    assert describe_encoder(str(tmp_path)).transform == published
    assert describe_encoder("random").transform == published
    timm_default = describe_encoder("random", model_arch="vit_tiny_patch16_224").transform
    assert timm_default is not None and timm_default.mean == (0.5, 0.5, 0.5)


def test_an_encoder_without_a_transform_is_refused(tmp_path: Path) -> None:
    write_timm_folder(tmp_path / "enc", "vit_tiny_patch16_224")
    settings = json.loads((tmp_path / "enc" / "config.json").read_text())
    del settings["pretrained_cfg"]["mean"]
    (tmp_path / "enc" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: pretrained_cfg lacks mean"):
        describe_encoder(str(tmp_path / "enc"))
    (tmp_path / "enc" / "config.json").unlink()
    with pytest.raises(ValueError, match="images that it expects are not known; put the config"):
        describe_encoder(str(tmp_path / "enc"), model_arch="vit_tiny_patch16_224")
    theirs = tile_encoder.published_transform(48)
    with pytest.raises(ValueError, match="takes images of 32 px, its transform gives 48 px"):
        TileEncoder(tiny_model(), transform=theirs)
