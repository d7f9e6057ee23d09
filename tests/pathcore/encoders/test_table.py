"""Every preset that public libraries build, against a restatement of what its authors say.

The table repeats, from the authors' and other toolkits' code, what the preset files state: networks
at their real size, pixels, reading. Features at a tiny width are computed by the libraries
themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from pathcore.encoders import Encoder, create_encoder, get_preset, list_encoders
from pathcore.encoders.towers import build_tower
from tests.pathcore.encoders.test_encoder import OWN, TINY, picture, stored, timm_model
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip

STATS = {
    "IN": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "OAI": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "HALF": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "HOPT": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "LUNIT": ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)),
}

# Width, blocks, heads, patch, class and register tokens, first layer of the MLP | shorter side or
# both, crop, filter, statistics | reading, length | patch on the slide, micrometres per pixel.
VITS = """
uni              1024 24 16 16 1 4096 | 224 224 bilinear IN | class 1024 | 256 0.5
uni2-h           1536 24 24 14 9 8192 | 224 224 bilinear IN | class 1536 | 256 0.5
virchow          1280 32 16 14 1 6832 | 224 - bicubic IN | class+mean 2560 | 224 0.5
virchow-cls      1280 32 16 14 1 6832 | 224 - bicubic IN | class 1280 | 224 0.5
virchow2         1280 32 16 14 5 6832 | 224 - bicubic IN | class+mean 2560 | 224 2,1,0.5,0.25
virchow2-cls     1280 32 16 14 5 6832 | 224 - bicubic IN | class 1280 | 224 2,1,0.5,0.25
h-optimus-0      1536 40 24 14 5 8192 | 224 - bilinear HOPT | class 1536 | 224 0.5
h-optimus-1      1536 40 24 14 5 8192 | 224 - bilinear HOPT | class 1536 | 224 0.5
h0-mini          768 12 12 14 5 4096 | 224 224 bicubic HOPT | class 768 | 224 0.5
h0-mini-mean     768 12 12 14 5 4096 | 224 224 bicubic HOPT | class+mean 1536 | 224 0.5
prov-gigapath    1536 40 24 16 1 8192 | 256 224 bicubic IN | class 1536 | 256 0.5
gigapath-flash   384 12 6 16 1 2048 | 256 224 bicubic IN | class 384 | 256 0.5
gpfm             1024 24 16 14 1 4096 | 224 - bicubic IN | class 1024 | 256 0.5
mstar            1024 24 16 16 1 4096 | 224 224 bilinear IN | class 1024 | 256 0.5
pathorchestra    1024 24 16 16 1 4096 | 224 - bilinear IN | class 1024 | 256 0.5
openmidnight     1536 40 24 14 5 8192 | 224x224 - bilinear IN | class 1536 | 224 0.5
kaiko-vits8      384 12 6 8 1 1536 | 224 224 bilinear HALF | class 384 | 256 0.5
kaiko-vits16     384 12 6 16 1 1536 | 224 224 bilinear HALF | class 384 | 256 0.5
kaiko-vitb8      768 12 12 8 1 3072 | 224 224 bilinear HALF | class 768 | 256 0.5
kaiko-vitb16     768 12 12 16 1 3072 | 224 224 bilinear HALF | class 768 | 256 0.5
kaiko-vitl14     1024 24 16 14 5 4096 | 224 224 bilinear HALF | class 1024 | 256 0.5
lunit-vits8      384 12 6 8 1 1536 | 248 224 bicubic LUNIT | class 384 | 256 0.5
lunit-vits16     384 12 6 16 1 1536 | 248 224 bicubic LUNIT | class 384 | 256 0.5
hipt-vit256      384 12 6 16 1 1536 | 256 256 bicubic HALF | class 384 | 256 0.5
vit-b16-in21k    768 12 12 16 1 3072 | 248 224 bicubic HALF | class 768 | 224 -
mae-b            768 12 12 16 1 3072 | 256 224 bicubic IN | class 768 | 224 -
mae-l            1024 24 16 16 1 4096 | 256 224 bicubic IN | class 1024 | 224 -
mae-h            1280 32 16 14 1 5120 | 256 224 bicubic IN | class 1280 | 224 -
retfound-mae     1024 24 16 16 1 4096 | 224x224 - bicubic IN | class 1024 | 224 -
dinov2-s14       384 12 6 14 1 1536 | 256 224 bicubic IN | class 384 | 224 -
dinov2-b14       768 12 12 14 1 3072 | 256 224 bicubic IN | class 768 | 224 -
dinov2-l14       1024 24 16 14 1 4096 | 256 224 bicubic IN | class 1024 | 224 -
dinov2-g14       1536 40 24 14 1 8192 | 256 224 bicubic IN | class 1536 | 224 -
dinov2-s14-reg4  384 12 6 14 5 1536 | 256 224 bicubic IN | class 384 | 224 -
dinov2-b14-reg4  768 12 12 14 5 3072 | 256 224 bicubic IN | class 768 | 224 -
dinov2-l14-reg4  1024 24 16 14 5 4096 | 256 224 bicubic IN | class 1024 | 224 -
dinov2-g14-reg4  1536 40 24 14 5 8192 | 256 224 bicubic IN | class 1536 | 224 -
"""
# What is built | the rest as above.
OTHERS = """
resnet50-imagenet  resnet50 | 224 224 bilinear IN | layer3 1024 | 256 0.5
retccl             resnet50 | 256 - bilinear IN | output 2048 | 256 1
ctranspath         ctranspath | 224 - bilinear IN | output 768 | 224 1
chief-ctp          ctranspath | 224 - bilinear IN | output 768 | 256 1
keep               keep | 224 224 bicubic IN | output 768 | 256 0.5
phikon             vit | 224 - bilinear IN | class 768 | 224 0.5
phikon-v2          dinov2-l | 224 224 bilinear IN | class 1024 | 224 0.5
phaet              dinov2-l | 224 224 bilinear IN | class 1024 | 224 0.5
midnight           dinov2-g | 224 224 bilinear HALF | class+mean 3072 | 224 0.25,0.5,1,2
midnight-cls       dinov2-g | 224 224 bilinear HALF | class 1536 | 224 0.25,0.5,1,2
mascaret           dinov2-g | 224 224 bilinear HALF | class 1536 | 224 0.5
plip               clip-b | 224 224 bicubic OAI | projected 512 | 224 -
pathgen-clip-l     clip-l | 224 224 bicubic OAI | projected 768 | 224 -
medsiglip          siglip | 448x448 - bilinear HALF | projected 1152 | 448 -
pathgen-clip       ViT-B-16 | 224 224 bicubic OAI | projected 512 | 224 -
quiltnet-b-16      ViT-B-16 | 224 224 bicubic OAI | projected 512 | 224 -
quiltnet-b-16-pmb  ViT-B-16 | 224 224 bicubic OAI | projected 512 | 224 -
quiltnet-b-32      ViT-B-32 | 224 224 bicubic OAI | projected 512 | 224 -
biomedclip         biomedclip | 224 224 bicubic OAI | projected 512 | 224 -
omiclip            coca_ViT-L-14 | 224 224 bicubic OAI | projected 768 | 224 -
"""
NOT_BUILT = {
    *("conch", "conch-projected", "musk", "musk-single"),  # packages of their authors
    *("conch-v1.5", "genbio-pathfm", "hibou-b", "hibou-l"),  # code in their repositories
    *("rudolfv-2", "rudolfv-2-b", "rudolfv-2-s"),
    "prost40m",  # its architecture and transform stand beside its weights
}

SIZES = {
    # Parameters in millions, from the facts that authors and other toolkits publish.
    "uni": 303.4, "uni2-h": 681.4, "virchow": 631.2, "h0-mini": 85.7, "kaiko-vits16": 21.7,
    "lunit-vits8": 21.7, "resnet50-imagenet": 23.5, "gpfm": 303.4, "dinov2-g14": 1136.5,
}  # fmt: skip


def rows(table: str) -> dict[str, list[list[str]]]:
    found = {}
    for line in table.strip().splitlines():
        first, *rest = (part.split() for part in line.split("|"))
        found[first[0]] = [first[1:], *rest]
    return found


TABLE = rows(VITS) | rows(OTHERS)
OF_TIMM = [name for name in TABLE if get_preset(name).library == "timm"]
OF_TRANSFORMERS = [name for name in TABLE if get_preset(name).library == "transformers"]
OF_OPEN_CLIP = [name for name in TABLE if get_preset(name).library == "open_clip"]


def by_hand(image: Image.Image, row: list[str]) -> Tensor:
    """The pixels by Pillow and NumPy alone."""
    resize, crop, method, stats = row
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[method]
    width, height = image.size
    if "x" in resize:
        size = tuple(map(int, resize.split("x")))
    else:
        short = int(resize)
        size = (
            (short, int(short * height / width))
            if width < height
            else (int(short * width / height), short)
        )
    image = image.resize(size, resample)  # type: ignore[arg-type]
    if crop != "-":
        left, top = (round((side - int(crop)) / 2) for side in image.size)
        image = image.crop((left, top, left + int(crop), top + int(crop)))
    mean, std = (np.array(values, np.float32) for values in STATS[stats])
    pixels = (np.asarray(image, np.float32) / 255 - mean) / std
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_the_table_holds_every_preset() -> None:
    assert set(TABLE) | NOT_BUILT == set(list_encoders())
    for name in NOT_BUILT:
        preset = get_preset(name)
        assert preset.package or preset.remote_code or not preset.architecture


@pytest.mark.parametrize("name", TABLE)
def test_pixels_and_reading_are_those_of_the_authors(name: str) -> None:
    _, transform, (feature, dim), (patch_px, mpp) = TABLE[name]
    preset = get_preset(name)
    assert preset.transform is not None
    images = [picture(width=256)]
    if transform[1] != "-":  # without a crop, images are square
        images += [picture(1), picture(2, width=256, height=320)]
    for image in images:
        torch.testing.assert_close(
            preset.transform(image), by_hand(image, transform), rtol=0, atol=1e-5
        )
    assert (preset.feature, preset.embed_dim, preset.patch_px) == (feature, int(dim), int(patch_px))
    assert preset.mpp == (() if mpp == "-" else tuple(map(float, mpp.split(","))))


def test_timms_own_data_configuration_agrees() -> None:
    for name, tagged in (
        ("vit-b16-in21k", "vit_base_patch16_224.augreg_in21k"),
        ("kaiko-vitb16", "vit_base_patch16_224.augreg_in21k"),  # statistics alone
        ("dinov2-b14", "vit_base_patch14_dinov2.lvd142m"),
    ):
        config = timm.models.get_pretrained_cfg(tagged).to_dict()
        own = timm.data.resolve_data_config(config)
        transform = get_preset(name).transform
        assert transform is not None
        assert (transform.mean, transform.std) == (own["mean"], own["std"])
        if name == "vit-b16-in21k":
            theirs = timm.data.create_transform(**own, is_training=False)
            torch.testing.assert_close(transform(picture()), theirs(picture()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", rows(VITS))
def test_vision_transformers_at_their_real_size(name: str) -> None:
    width, depth, heads, patch, prefix, hidden = map(int, TABLE[name][0])
    preset = get_preset(name)
    with torch.device("meta"):
        tower = build_tower(
            dict(
                library="timm", architecture=preset.architecture, arguments=preset.arguments,
                feature=preset.feature,
            )
        )  # fmt: skip
    module: Any = tower.module
    assert (module.embed_dim, len(module.blocks)) == (width, depth)
    assert module.blocks[0].attn.num_heads == heads
    assert tuple(module.patch_embed.patch_size) == (patch, patch)
    assert module.num_prefix_tokens == prefix
    assert module.blocks[0].mlp.fc1.out_features == hidden
    assert tower.embed_dim == preset.embed_dim
    if name in SIZES:
        count = sum(parameter.numel() for parameter in module.parameters()) / 1e6
        assert count == pytest.approx(SIZES[name], rel=0.005)


@pytest.mark.parametrize("name", [name for name in OF_TIMM if name not in rows(VITS)])
def test_resnets_at_their_real_size(name: str) -> None:
    preset = get_preset(name)
    with torch.device("meta"):
        tower = build_tower(dict(library="timm", architecture="resnet50", feature=preset.feature))
    assert preset.architecture == "resnet50" and tower.embed_dim == int(TABLE[name][2][1])
    count = sum(parameter.numel() for parameter in tower.module.parameters()) / 1e6
    assert count == pytest.approx(SIZES["resnet50-imagenet"], rel=0.005)


@pytest.mark.parametrize("name", OF_TIMM)
def test_features_of_timm(name: str, tmp_path: Path) -> None:
    layout, _, (feature, _), _ = TABLE[name]
    is_vit = name in rows(VITS)
    tiny = TINY if is_vit else {}
    model: Any = timm_model(name, **tiny)
    encoder = create_encoder(name, stored(model, tmp_path / "w.bin"), device="cpu", **tiny)
    pixels = encoder.preprocess([picture(width=256)])
    with torch.inference_mode():
        if is_vit:
            tokens = model.forward_features(pixels)
            expected = tokens[:, 0]
            if feature == "class+mean":
                mean = tokens[:, int(layout[4]) :].mean(1)
                expected = torch.cat([expected, mean], dim=-1)
        elif feature == "layer3":
            maps = nn.Sequential(
                model.conv1, model.bn1, model.act1, model.maxpool,
                model.layer1, model.layer2, model.layer3,
            )  # fmt: skip
            expected = maps(pixels).mean((2, 3))
        else:
            expected = model(pixels)
    found = encoder.features(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape[1] == encoder.embed_dim


REAL: dict[str, dict[str, Any]] = {
    "vit": dict(model_type="vit"),
    "dinov2-l": dict(model_type="dinov2", hidden_size=1024, num_hidden_layers=24,
                     num_attention_heads=16, patch_size=16),
    "dinov2-g": dict(model_type="dinov2", hidden_size=1536, num_hidden_layers=40,
                     num_attention_heads=24, patch_size=14, use_swiglu_ffn=True),
    "clip-b": dict(model_type="clip_vision_model", patch_size=32, projection_dim=512),
    "clip-l": dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
                   num_hidden_layers=24, num_attention_heads=16, patch_size=14,
                   projection_dim=768),
}  # fmt: skip
MILLIONS = {"vit": 85.8, "dinov2-l": 303.4, "dinov2-g": 1136.5, "clip-b": 87.8, "clip-l": 304.0}


@pytest.mark.parametrize("name", [n for n in OF_TRANSFORMERS if TABLE[n][0] != ["siglip"]])
def test_models_of_transformers_at_their_real_size(name: str) -> None:
    ((kind,), _, (feature, dim), _) = TABLE[name]
    with torch.device("meta"):
        tower = build_tower(dict(library="transformers", config=REAL[kind], feature=feature))
    assert tower.embed_dim == int(dim)
    count = sum(p.numel() for n, p in tower.module.named_parameters() if "position" not in n) / 1e6
    assert count == pytest.approx(MILLIONS[kind], rel=0.01)


def save_tiny(kind: str, folder: Path) -> Any:
    """A tiny model of the same kind, as transformers stores it."""
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    if kind.startswith("clip"):
        save_hugging_face(folder)
        return transformers.CLIPModel.from_pretrained(folder).eval()
    if kind == "siglip":
        config = transformers.SiglipConfig(
            text_config=small, vision_config=small | dict(image_size=448, patch_size=64)
        )
        model: Any = transformers.SiglipModel(config)
    else:
        values = dict(REAL[kind], image_size=224) | small
        model_type = values.pop("model_type")
        model = transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(model_type, **values)
        )
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_features_of_transformers(name: str, tmp_path: Path) -> None:
    ((kind,), _, (feature, _), _) = TABLE[name]
    model = save_tiny(kind, tmp_path / "model")
    encoder = create_encoder(name, tmp_path / "model", device="cpu")
    size = 32 if kind.startswith("clip") else encoder.input_px
    pixels = torch.randn(2, 3, size or 224, size or 224)
    with torch.inference_mode():
        if feature == "projected":
            expected = model.get_image_features(pixel_values=pixels)
        else:
            tokens = model(pixel_values=pixels).last_hidden_state
            expected = tokens[:, 0]
            if feature == "class+mean":
                expected = torch.cat([expected, tokens[:, 1:].mean(1)], dim=-1)
    found = encoder.features(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.shape[1] == encoder.embed_dim


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_models_of_open_clip_at_their_real_size(name: str) -> None:
    ((architecture,), _, (_, dim), _) = TABLE[name]
    described: dict[str, Any] = dict(architecture=architecture)
    if architecture == "biomedclip":  # its hub configuration
        vision = dict(timm_model_name="vit_base_patch16_224", timm_model_pretrained=False,
                      timm_pool="", timm_proj="linear", image_size=224)  # fmt: skip
        described = dict(config=dict(embed_dim=512, vision_cfg=vision))
    with torch.device("meta"):
        tower = build_tower(dict(library="open_clip", **described))
    assert tower.embed_dim == int(dim)
    count = sum(p.numel() for p in tower.module.parameters()) / 1e6
    expected = {"ViT-B-32": 87.8, "coca_ViT-L-14": 306.7}.get(architecture, 86.2)
    assert count == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_features_of_open_clip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    save_open_clip(folder)
    weights: Path = folder
    architecture = get_preset(name).architecture
    if architecture:  # a file for an architecture of open_clip
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        if architecture.startswith("coca"):
            config["multimodal_cfg"] = dict(width=16, heads=2, layers=1, context_length=77)
            config["text_cfg"] |= dict(embed_cls=True, output_tokens=True)
            config["vision_cfg"] |= dict(output_tokens=True)
            config["custom_text"] = True
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, config)
        torch.manual_seed(1)
        weights = folder / "weights.pt"
        torch.save(open_clip.create_model(architecture).state_dict(), weights)
        model = open_clip.create_model(architecture, pretrained=str(weights)).eval()
    else:
        model = open_clip.create_model(f"local-dir:{folder}").eval()
    encoder = create_encoder(name, weights, device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.encode_image(pixels)
    assert torch.equal(encoder.features(pixels), expected)
    assert expected.shape[1] == encoder.embed_dim == 16 and encoder.has_text


def test_networks_of_this_package_are_in_the_other_tables() -> None:
    own = {name for name in TABLE if get_preset(name).library == "own"}
    assert own == set(OWN)  # test_encoder: sizes and features


def test_a_folder_whose_configuration_leaves_the_pooling_open(tmp_path: Path) -> None:
    """Virchow's `config.json`: `global_pool` is empty, so timm would give all tokens."""
    model = timm_model("virchow", **TINY)
    stored(model, tmp_path / "pytorch_model.bin")
    preset = get_preset("virchow")
    config = {
        "architecture": preset.architecture, "global_pool": "",
        "model_args": {**preset.arguments, **TINY},
        "pretrained_cfg": {
            "input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3,
            "interpolation": "bicubic", "crop_pct": 0,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder: Encoder = create_encoder(str(tmp_path), device="cpu")
    assert encoder.features([picture()]).shape == (1, 32) and encoder.feature == "class"
