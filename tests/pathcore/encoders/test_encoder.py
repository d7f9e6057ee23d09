"""Encoders by name: architectures, transforms and features against the libraries' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from pathcore.encoders import EncoderError, EncoderName, create_encoder, get_preset
from pathcore.encoders.encoder import _build_preset, default_precision
from pathcore.encoders.networks import NETWORKS
from pathcore.encoders.towers import build_tower, open_tower
from pathcore.encoders.transform import Transform
from pathcore.images import load_image
from pathcore.weights import CheckpointError

TINY: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=4)


def picture(seed: int = 0, width: int = 300, height: int = 256) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def timm_model(name: str, **more: Any) -> nn.Module:
    preset = get_preset(name)
    arguments = {"num_classes": 0, **preset.arguments, **more}
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    if "act_layer" in arguments:
        arguments["act_layer"] = timm.layers.get_act_layer(arguments["act_layer"])
    return timm.create_model(preset.architecture, **arguments).eval()


def stored(model: nn.Module, path: Path, seed: int = 0) -> Path:
    """Random weights of a model, as `torch.save` writes them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("architecture", NETWORKS)
def test_own_networks_are_built_at_their_real_size(architecture: str) -> None:
    with torch.device("meta"):
        model = NETWORKS[architecture]()
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx({"ctranspath": 27.5, "keep": 304.7}[architecture], rel=0.01)


SWIN: dict[str, Any] = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), img_size=224)
OWN: dict[str, dict[str, Any]] = {
    "ctranspath": SWIN,
    "chief-ctp": SWIN,
    "keep": {**TINY, "projection_dim": 16},
}


@pytest.mark.parametrize("name", OWN)
def test_features_of_own_networks(name: str, tmp_path: Path) -> None:
    """Relative positions of a Swin are in no file: they must be computed, not left on meta."""
    preset = get_preset(name)
    model = NETWORKS[preset.architecture](**OWN[name]).eval()
    encoder = create_encoder(name, stored(model, tmp_path / "w.bin"), device="cpu", **OWN[name])
    with torch.inference_mode():
        expected = model(encoder.preprocess([picture(width=256)]))
    torch.testing.assert_close(encoder.features([picture(width=256)]), expected, rtol=0, atol=1e-5)
    assert expected.shape[1] == encoder.embed_dim


@pytest.mark.parametrize("name", ["uni", "uni2-h", "virchow", "virchow2", "h0-mini", "h0-mini-mean",
                                  "lunit-vits16", "h-optimus-0"])  # fmt: skip
def test_features_are_those_of_timm_by_hand(name: str, tmp_path: Path) -> None:
    preset = get_preset(name)
    model = timm_model(name, **TINY)
    encoder = create_encoder(name, stored(model, tmp_path / "w.bin"), **TINY)
    # Transforms without a crop are for square patches, as wsi cuts them.
    images = [picture(seed, width=256) for seed in range(2)]
    pixels = torch.stack([encoder.transform(image) for image in images])
    with torch.inference_mode():
        tokens = model.forward_features(pixels)
    registers = preset.arguments.get("reg_tokens", 4 if "reg4" in preset.architecture else 0)
    assert tokens.shape[1] == 1 + registers + (224 // model.patch_embed.patch_size[0]) ** 2
    expected = tokens[:, 0]
    if preset.feature == "class+mean":
        expected = torch.cat([expected, tokens[:, 1 + registers :].mean(1)], dim=-1)
    found = encoder.features(images)
    assert found.dtype == torch.float32 and found.shape == (2, encoder.embed_dim)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    described = encoder.describe()
    assert described["encoder"] == name and len(described["digest"]) == 64
    assert described["transform"] == preset.transform.to_dict()  # type: ignore[union-attr]
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(
    "arch", ["vit_base_patch16_224.augreg_in21k", "vit_small_patch14_dinov2.lvd142m",
             "resnet50.tv_in1k", "vit_base_patch16_clip_224.openai"],
)  # fmt: skip
def test_a_model_of_timm_brings_its_own_transform(arch: str, tmp_path: Path) -> None:
    tiny = {} if arch.startswith("resnet") else {**TINY, "img_size": 224}
    model = timm.create_model(arch, pretrained=False, num_classes=0, **tiny).eval()
    encoder = create_encoder(f"timm:{arch}", stored(model, tmp_path / "w.bin"), **tiny)
    config = timm.models.get_pretrained_cfg(arch).to_dict()
    own = timm.data.create_transform(**timm.data.resolve_data_config(config), is_training=False)
    image = picture(3)
    if arch.startswith("vit_small"):  # timm gives 518 px, and the network was made smaller here
        assert encoder.input_px == 518
        return
    torch.testing.assert_close(encoder.transform(image), own(image), rtol=0, atol=0)
    with torch.inference_mode():
        expected = model(own(image)[None])
    torch.testing.assert_close(encoder.features([image]), expected, rtol=0, atol=1e-5)


def test_images_of_any_mode_are_read_as_files_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    clear = Image.fromarray(values[..., :3]).quantize(8)
    clear.info["transparency"] = 3
    deep = Image.fromarray(values[..., 0].astype(np.int32) * 257)
    images = {"alpha.png": Image.fromarray(values), "clear.png": clear, "deep.tif": deep}
    for name, image in images.items():
        image.save(tmp_path / name)
        expected = load_image(tmp_path / name)
        for transform in (get_preset("uni").transform, get_preset("medsiglip").transform):
            assert transform is not None
            assert torch.equal(transform(image), transform(expected)), name


def test_a_file_without_a_transform_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY)
    file = stored(model, tmp_path / "w.bin")
    with pytest.raises(EncoderError, match=r"no config\.json beside it"):
        create_encoder("timm:vit_tiny_patch16_224", file, **TINY)
    config = {
        "architecture": "vit_tiny_patch16_224", "num_features": 32, "global_pool": "token",
        "model_args": TINY,
        "pretrained_cfg": {
            "input_size": [3, 224, 224], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
            "interpolation": "bilinear", "crop_pct": 1.0,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = create_encoder("timm:vit_tiny_patch16_224", file, **TINY)
    assert encoder.transform.mean == (0.1, 0.2, 0.3) and encoder.transform.resize_px == 224
    (tmp_path / "pytorch_model.bin").write_bytes(file.read_bytes())
    same = create_encoder(str(tmp_path))
    assert torch.equal(same.features([picture()]), encoder.features([picture()]))
    del config["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pretrained_cfg lacks input_size, mean, std"):
        create_encoder(str(tmp_path))


def test_weights_that_do_not_fit_stop(tmp_path: Path) -> None:
    other = stored(timm_model("uni", **{**TINY, "depth": 1}), tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.norm1\.weight"):
        create_encoder("uni", other, **TINY)
    with pytest.raises(FileNotFoundError, match="no such file"):
        create_encoder("uni@/nowhere/w.bin")
    with pytest.raises(FileNotFoundError, match=r"fetch ctranspath\.pth from https://github"):
        create_encoder("ctranspath")


def test_default_precision_is_known_before_the_weights_are_read() -> None:
    assert default_precision("uni2-h", "cuda") == get_preset("uni2-h").precision != "float32"
    assert default_precision("uni2-h", "cpu") == "float32"
    assert default_precision("timm:vit_tiny_patch16_224", "cuda") == "float32"


def test_weights_stored_in_half_precision_compute_in_float32(tmp_path: Path) -> None:
    model = timm_model("uni", **TINY)
    stored(model, tmp_path / "w.bin")
    torch.save({n: t.half() for n, t in model.state_dict().items()}, tmp_path / "half.bin")
    encoder = create_encoder("uni", tmp_path / "half.bin", device="cpu", **TINY)
    with torch.inference_mode():
        expected = model.half().float()(encoder.preprocess([picture()]))
    torch.testing.assert_close(encoder.features([picture()]), expected, rtol=0, atol=1e-5)


def test_a_model_that_pools_its_patches_is_read_as_timm_reads_it(tmp_path: Path) -> None:
    """Its class token has no norm; timm's own output is the mean of the patches, normalised."""
    tiny = {**TINY, "img_size": 224, "global_pool": "avg"}
    arch = "vit_base_patch16_224.augreg_in21k"
    model = timm.create_model(arch, num_classes=0, **tiny).eval()
    file = stored(model, tmp_path / "w.bin")
    encoder = create_encoder(f"timm:{arch}", file, device="cpu", **tiny)
    with torch.inference_mode():
        expected = model(encoder.preprocess([picture()]))
    assert torch.equal(encoder.features([picture()]), expected)


def test_what_cannot_be_built_says_what_helps() -> None:
    with pytest.raises(EncoderError, match=r"pip install git\+https://github.com/mahmoodlab/CONCH"):
        create_encoder("conch")
    with pytest.raises(EncoderError, match="pass trust_remote_code=True"):
        create_encoder("hibou-l")
    with pytest.raises(EncoderError, match=r"library 'keras', expected one of timm, hf, open_clip"):
        create_encoder("keras:resnet")
    with pytest.raises(EncoderError, match="timm has no such model; did you mean "):
        create_encoder("timm:vit_colossal")
    with pytest.raises(EncoderError, match="expected one of float32, float16, bfloat16"):
        create_encoder("uni", precision="int8")
    with pytest.raises(ValueError, match="did you mean uni2-h"):
        create_encoder("uni2h@w.bin")


def test_a_model_tuned_on_its_patches_is_read_so(tmp_path: Path) -> None:
    """Its class token has no norm of its own: reading it would give untrained numbers."""
    tiny = {**TINY, "global_pool": "avg"}
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **tiny).eval()
    file = stored(model, tmp_path / "tuned.pth")
    encoder = create_encoder("mae-b", file, **TINY)
    assert encoder.feature == "mean"
    with torch.inference_mode():
        expected = model(encoder.preprocess([picture()]))
    torch.testing.assert_close(encoder.features([picture()]), expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="fine-tuned on the mean of its patch tokens"):
        create_encoder("mae-b", file, feature="class+mean", **TINY)


def hugging_face_folder(kind: str, folder: Path) -> Any:
    import transformers

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(1)
    if kind == "dinov2":
        config = transformers.Dinov2Config(**small, image_size=56, patch_size=14, mlp_ratio=2)
        model: Any = transformers.Dinov2Model(config)
    elif kind == "registers":
        config = transformers.Dinov2WithRegistersConfig(
            **small, image_size=56, patch_size=14, num_register_tokens=4
        )
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.ViTConfig(**small, image_size=224, patch_size=16)
        model = transformers.ViTModel(config, add_pooling_layer=False)
    model.eval().save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return model


@pytest.mark.parametrize(("kind", "prefix"), [("dinov2", 1), ("registers", 5), ("vit", 1)])
def test_models_of_transformers(kind: str, prefix: int, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    model = hugging_face_folder(kind, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    image = picture(4)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    encoder = create_encoder(f"hf:{tmp_path}")
    torch.testing.assert_close(encoder.preprocess([image]), pixels, rtol=0, atol=1e-5)
    with torch.inference_mode():
        tokens = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(encoder.features([image]), tokens[:, 0], rtol=0, atol=1e-4)
    both = create_encoder(str(tmp_path), feature="class+mean")
    expected = torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=-1)
    torch.testing.assert_close(both.features([image]), expected, rtol=0, atol=1e-4)
    assert both.embed_dim == 64 and not both.has_text
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"no preprocessor_config\.json"):
        create_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("kind", ["swin", "convnext", "resnet"])
def test_models_of_transformers_that_pool_by_themselves(kind: str, tmp_path: Path) -> None:
    """They have no class token: the first token of a Swin is its first patch."""
    import transformers

    small: dict[str, Any] = {
        "swin": dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=56),
        "convnext": dict(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
        "resnet": dict(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
    }[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **small))
    model.eval().save_pretrained(tmp_path)
    transformers.BitImageProcessor().save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    encoder = create_encoder(str(tmp_path), device="cpu")
    with torch.inference_mode():
        expected = model(pixels).pooler_output.flatten(1)
    torch.testing.assert_close(encoder.features(pixels), expected, rtol=0, atol=1e-6)
    assert encoder.feature == "pooler" and encoder.embed_dim == expected.shape[1]
    with pytest.raises(EncoderError, match="has no class token and pools by itself"):
        create_encoder(str(tmp_path), feature="class")


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("width", [256, 300])
def test_processors_of_transformers_that_crop_by_themselves(size: int, width: int) -> None:
    import transformers

    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": size}, crop_pct=0.9)
    image = picture(6, width=width)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    found = Transform.from_hugging_face(processor.to_dict(), source="test")(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_model_of_timm_says_how_long_its_features_are() -> None:
    for name in ("mobilenetv3_small_050", "inception_next_atto", "resnet18"):
        tower = build_tower({"library": "timm", "architecture": name})
        tower.module.eval()
        features = tower.features(torch.zeros(2, 3, 64, 64))
        assert features.shape == (2, tower.embed_dim)


@pytest.mark.parametrize(
    ("arguments", "feature", "message"),
    [
        (dict(class_token=False, global_pool="avg"), "class", "has no class token"),
        (dict(class_token=False, global_pool="avg", reg_tokens=4), "class+mean", "no class token"),
        (dict(class_token=False, global_pool=""), None, "global_pool is '', so its output"),
    ],
)
def test_a_patch_is_never_taken_for_the_class_token(
    arguments: dict[str, Any], feature: str | None, message: str
) -> None:
    described = {"architecture": "vit_tiny_patch16_224", "arguments": TINY | arguments}
    with pytest.raises(EncoderError, match=message):
        build_tower({"library": "timm", "feature": feature, **described})


def test_weights_and_arguments_are_used_or_refused(tmp_path: Path) -> None:
    hugging_face_folder("vit", tmp_path / "vit")
    (tmp_path / "timm").mkdir()
    model = timm.create_model("resnet18", num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "timm", model_config={"num_classes": 0})
    other = stored(model, tmp_path / "other.pth")
    for name in (f"hf:{tmp_path / 'vit'}", str(tmp_path / "timm")):
        create_encoder(name)
        with pytest.raises(EncoderError, match=r"other\.pth: expected none, .* brings its own"):
            create_encoder(name, other)
    for name in ("hf:owner/name@main", "open_clip:hf-hub:owner/name@w.pt"):
        with pytest.raises(EncoderError, match=r"expected none, .* brings its own"):
            create_encoder(name)
    for name in (f"hf:{tmp_path / 'vit'}", f"phikon@{tmp_path / 'vit'}", "conch"):
        with pytest.raises(EncoderError, match="argument 'image_size': expected none"):
            create_encoder(name, image_size=448)


def test_transformers_never_fills_in_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hugging_face_folder("vit", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    cut = {name: t for name, t in weights.items() if ".layer.1." not in name}
    save_file(cut, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: encoder\.layer\.1\."):
        create_encoder(f"hf:{tmp_path}")


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    (folder / "tiny-encoder-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(2)
    model = open_clip.create_model("tiny-encoder-test")
    torch.save(model.state_dict(), folder / "w.pt")
    return "tiny-encoder-test", folder / "w.pt"


def test_models_of_open_clip(open_clip_file: tuple[str, Path], tmp_path: Path) -> None:
    arch, file = open_clip_file
    model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=str(file))
    image, texts = picture(5), ["tumour", "a much longer text about glands"]
    encoder = create_encoder(f"open_clip:{arch}@{file}")
    torch.testing.assert_close(encoder.transform(image), preprocess(image), rtol=0, atol=0)
    with torch.inference_mode():
        seen = model.eval().encode_image(preprocess(image)[None])
        read = model.encode_text(open_clip.get_tokenizer(arch)(texts))
    torch.testing.assert_close(encoder.features([image]), seen, rtol=0, atol=1e-5)
    norms = encoder.encode_images([image]).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        encoder.encode_texts(texts), nn.functional.normalize(read, dim=-1), rtol=0, atol=1e-5
    )
    assert encoder.has_text and encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    traced = torch.jit.trace_module(model, {"encode_image": preprocess(image)[None]})
    traced.save(str(tmp_path / "openai.pt"))  # as OpenAI publishes its weights
    archive = create_encoder(f"open_clip:{arch}@{tmp_path / 'openai.pt'}")
    assert torch.equal(archive.features([image]), encoder.features([image]))
    with pytest.raises(EncoderError, match="without weights it would be random"):
        create_encoder(f"open_clip:{arch}")
    with pytest.raises(FileNotFoundError, match="is neither a file nor one of"):
        create_encoder(f"open_clip:{arch}@nothing")
    half = {name: t for name, t in torch.load(file).items() if "resblocks" not in name}
    torch.save(half, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match=r"missing: .*resblocks"):
        create_encoder(f"open_clip:{arch}@{tmp_path / 'half.pt'}")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        create_encoder(f"open_clip:{arch}@{tmp_path / 'pointer.pt'}")


def test_weights_of_openai_need_their_activation(tmp_path: Path) -> None:
    """They load with GELU instead of QuickGELU, and all scores just fall."""
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-rn.json").write_text(json.dumps(config))
    (tmp_path / "tiny-rn-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny-rn-quickgelu").eval()
    file = tmp_path / "RN.pt"
    torch.save(model.state_dict() | {"input_resolution": torch.tensor(32)}, file)
    with pytest.raises(EncoderError, match=r"QuickGELU, which .*; use tiny-rn-quickgelu"):
        create_encoder(f"open_clip:tiny-rn@{file}")
    encoder = create_encoder(f"open_clip:tiny-rn-quickgelu@{file}", device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.encode_image(pixels)
    assert torch.equal(encoder.features(pixels), expected)
    with pytest.raises(EncoderError, match="use tiny-rn-quickgelu"):  # the image tower alone
        described = {"library": "open_clip", "architecture": "tiny-rn"}
        open_tower(described, torch.load(file), name="tiny-rn", source=file)
    with pytest.raises(EncoderError, match="use ViT-B-16-quickgelu"):
        create_encoder("open_clip:ViT-B-16@openai")


def test_a_clip_of_transformers_compares_images_and_texts(tmp_path: Path) -> None:
    import transformers

    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                  intermediate_size=64, patch_size=8)  # fmt: skip
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                vocab_size=49408)  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    torch.manual_seed(3)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    encoder = create_encoder(str(tmp_path))
    pixels = encoder.preprocess([picture()])
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(encoder.features(pixels), expected, rtol=0, atol=1e-5)
    assert (encoder.feature, encoder.embed_dim) == ("projected", 24)
    assert not encoder.has_text, "the folder has no tokenizer"
    built, reading = _build_preset(get_preset("plip"), str(tmp_path), "projected", False, {})
    assert built.embed_dim == 24 and reading == "projected"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uni", ("preset", "uni", "")),
        ("uni@a@b.bin", ("preset", "uni", "a@b.bin")),
        ("timm:resnet50.tv_in1k@w.pth", ("timm", "resnet50.tv_in1k", "w.pth")),
        ("hf:owner/name", ("hf", "owner/name", "")),
        ("open_clip:ViT-B-16@openai", ("open_clip", "ViT-B-16", "openai")),
        ("open_clip:hf-hub:owner/name", ("open_clip", "hf-hub:owner/name", "")),
    ],
)
def test_names(text: str, expected: tuple[str, str, str]) -> None:
    assert EncoderName.parse(text) == EncoderName(*expected)


@pytest.mark.parametrize("text", ["", "/no/such/folder", "./nothing", "timm:", "hf:"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(EncoderError):
        EncoderName.parse(text)
