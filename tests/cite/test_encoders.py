"""Encoders of every library: equal to the library's own forward pass, prompts or not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cite.encoders import build_encoder, open_encoder
from cite.encoders.base import Encoder
from cite.prompted import PromptedEncoder, merge_lora
from pathcore.encoders.layouts import resize_positions
from pathcore.encoders.networks import ctranspath
from pathcore.weights import CheckpointError
from tests.cite.goldens import CLIP, CLIP_ARCH, FP32, VIT

TIMM_SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
HF_SMALL = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3)
HF_SMALL |= dict(num_attention_heads=2, intermediate_size=48)

SWIN: dict[str, Any] = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), img_size=56)

TIMM: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_large_patch16_224": dict(init_values=1e-5, dynamic_img_size=True),  # UNI's
    "vit_giant_patch14_dinov2": dict(mlp_ratio=5.33),  # Prov-GigaPath's tile encoder
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": dict(global_pool="map"),
    "vit_small_patch16_224": dict(global_pool="avg", qk_norm=True),
}
HF: dict[str, dict[str, Any]] = {
    "clip_vision_model": dict(projection_dim=24),
    "dinov2": dict(mlp_ratio=2),
    "dinov2_with_registers": dict(num_register_tokens=3, use_swiglu_ffn=True),
    "vit": {},
    "deit": {},
}


def shake(module: nn.Module) -> None:
    """Makes layer scales, class tokens and biases count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def images(size: int = 32) -> Tensor:
    return torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))


def timm_vit(name: str = "vit_base_patch16_224", **arguments: Any) -> dict[str, Any]:
    return dict(library="timm", architecture=name, arguments=TIMM_SMALL | arguments)


def in_blocks(encoder: Encoder, **arguments: Any) -> PromptedEncoder:
    """Without prompts, by the blocks that prompts would enter."""
    model = PromptedEncoder(encoder, **arguments)
    encoder.take_apart()
    model.untouched = False
    return model


def make(kind: str, name: str) -> Encoder:
    torch.manual_seed(0)
    if kind == "timm":
        encoder = build_encoder(timm_vit(name, **TIMM[name]))
    else:
        config = {"model_type": name, **HF_SMALL, **HF[name]}
        feature = "projected" if name.startswith("clip") else "class"
        encoder = build_encoder(dict(library="transformers", config=config, feature=feature))
    shake(encoder)
    return encoder.eval()


def native(encoder: Encoder, pixel_values: Tensor) -> Tensor:
    model = encoder.model
    if encoder.spec["library"] == "timm":
        return model(pixel_values)
    output = model(pixel_values)
    return output.image_embeds if "image_embeds" in output else output.last_hidden_state[:, 0]


ALL = [("timm", name) for name in TIMM] + [("hf", name) for name in HF]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_equal_to_the_library(kind: str, name: str) -> None:
    encoder = make(kind, name)
    expected = native(encoder, images()).detach()
    assert torch.equal(PromptedEncoder(encoder)(images()), expected)
    found = in_blocks(encoder)(images())
    torch.testing.assert_close(found, expected, **FP32)
    assert found.shape == (5, encoder.embed_dim)
    assert build_encoder(json.loads(json.dumps(encoder.spec))).spec == encoder.spec


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_prompts_train_and_nothing_else_does(kind: str, name: str) -> None:
    model = PromptedEncoder(make(kind, name), prompt_length=2, prompt_layers=[0, 2])
    model(images()).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"prompts.prompt"}
    assert (trained["prompts.prompt"].abs().amax(dim=2) > 0).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_prompts_are_further_tokens_between_prefix_and_patches(kind: str, name: str) -> None:
    """The library's own blocks on tokens put together by hand."""
    encoder = make(kind, name)
    model = PromptedEncoder(encoder, prompt_length=2, prompt_init="normal")
    assert model.prompts is not None
    hidden = encoder.embed(images())
    prefix = encoder.num_prefix
    prompts = model.prompts.prompt[0].expand(len(hidden), -1, -1)
    hidden = torch.cat([hidden[:, :prefix], prompts, hidden[:, prefix:]], dim=1)
    if kind == "timm":
        blocks = encoder.model.blocks
    else:
        tower = getattr(encoder.model, "vision_model", encoder.model).encoder
        blocks = tower.layers if hasattr(tower, "layers") else tower.layer
    for block in blocks:
        output = block(hidden, None, None) if name.startswith("clip") else block(hidden)
        hidden = output[0] if isinstance(output, tuple) else output
    hidden = torch.cat([hidden[:, :prefix], hidden[:, prefix + 2 :]], dim=1)
    torch.testing.assert_close(model(images()), encoder.pool(hidden), **FP32)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_lora_and_low_precision(kind: str, name: str) -> None:
    expected = PromptedEncoder(make(kind, name))(images())
    adapted = PromptedEncoder(make(kind, name), lora=dict(r=2))
    torch.testing.assert_close(adapted(images()), expected, **FP32)
    assert len([p for p in adapted.parameters() if p.requires_grad]) == 3 * 2 * 2
    merge_lora(adapted.encoder)
    assert adapted.state_dict().keys() == PromptedEncoder(make(kind, name)).state_dict().keys()
    for narrow in (PromptedEncoder, in_blocks):
        found = narrow(make(kind, name), precision="bf16")(images())
        likeness = nn.functional.cosine_similarity(found, expected)
        assert (likeness > 0.99).all()


def test_vit_equals_the_hosts_own() -> None:
    from mmcls.models import VisionTransformer

    for options in (dict(), dict(qkv_bias=False, final_norm=False), dict(pre_norm=True)):
        encoder = build_encoder(VIT | options)
        shake(encoder)
        spec = {k: v for k, v in encoder.spec.items() if k not in ("library", "norm_eps")}
        norm = dict(type="LN", eps=encoder.spec["norm_eps"])
        theirs = VisionTransformer(**spec, norm_cfg=norm)
        theirs.eval()  # gives None in this library
        theirs.load_state_dict(encoder.model.state_dict())
        expected = theirs(images())[-1][-1]
        torch.testing.assert_close(PromptedEncoder(encoder)(images()), expected, **FP32)


@pytest.mark.parametrize("arch", ["base", "l", "deit-s", "mocov3-small"])
def test_named_architectures_have_the_hosts_shapes(arch: str) -> None:
    from mmpretrain.models import MoCoV3ViT, VisionTransformer

    kind = MoCoV3ViT if arch.startswith("moco") else VisionTransformer
    with torch.device("meta"):
        ours = build_encoder(dict(library="mm", arch=arch)).model.state_dict()
    expected = {
        name: tensor.shape for name, tensor in kind(arch=arch, patch_size=16).state_dict().items()
    }
    assert {name: tensor.shape for name, tensor in ours.items()} == expected


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_open_clip_equals_the_library(pool: str) -> None:
    vision = CLIP_ARCH["vision_cfg"] | {"pool_type": pool, "ls_init_value": 0.1}
    encoder = build_encoder(dict(library="open_clip", config=CLIP_ARCH | {"vision_cfg": vision}))
    shake(encoder)
    theirs = open_clip.model._build_vision_tower(48, vision, quick_gelu=True).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    with torch.no_grad():
        assert torch.equal(PromptedEncoder(encoder)(images()), theirs(images()))
    torch.testing.assert_close(in_blocks(encoder)(images()), theirs(images()).detach(), **FP32)
    assert PromptedEncoder(encoder, prompt_length=1)(images()).requires_grad


def test_open_clip_checkpoints_in_every_form(tmp_path: Path) -> None:
    text = dict(context_length=8, vocab_size=100, width=16, heads=2, layers=1)
    torch.manual_seed(0)
    clip = open_clip.CLIP(**CLIP_ARCH, text_cfg=text).eval()
    expected = clip.encode_image(images()).detach()
    state = clip.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pt")
    save_file(state, tmp_path / "b.safetensors")
    traced = torch.jit.trace_module(clip, {"encode_image": images()}, check_trace=False)
    traced.save(str(tmp_path / "c.pt"))
    hf = HF_SMALL | dict(hidden_size=128, intermediate_size=512, hidden_act="quick_gelu")
    from cite.conversions import clip_vision_to_hf

    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**hf, projection_dim=48)
    )
    model.load_state_dict(clip_vision_to_hf(state), strict=False)
    model.save_pretrained(tmp_path / "d")
    for name in ("a.pt", "b.safetensors", "c.pt", "d"):
        found = PromptedEncoder(build_encoder(CLIP, tmp_path / name))(images())
        torch.testing.assert_close(found, expected, **FP32)


def test_plip_folder_in_hugging_faces_and_in_the_released_names(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**HF_SMALL)
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(config).eval()
    expected = model(images()).pooler_output.detach()
    model.save_pretrained(tmp_path / "hf")
    released = tmp_path / "released"
    released.mkdir()
    values = config.to_dict() | {"model_type": "clip"}
    (released / "config.json").write_text(json.dumps({"vision_config": values, "text_config": {}}))
    names = {
        f"visual_encoder.{k}".replace("post_layernorm", "post_layrnorm"): v
        for k, v in load_file(tmp_path / "hf" / "model.safetensors").items()
    }
    names["visual_encoder.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    names["text_encoder.x"] = torch.zeros(1)
    torch.save(names, released / "pytorch_model.bin")
    for folder in (tmp_path / "hf", released):
        transformers.CLIPImageProcessor().save_pretrained(folder)
        for name in (str(folder), f"hf:{folder}"):
            found = PromptedEncoder(open_encoder(name))(images())
            torch.testing.assert_close(found, expected, **FP32)


def test_hugging_face_folders_of_whole_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("dinov2", **HF_SMALL, num_labels=2)
    model = transformers.Dinov2ForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    transformers.BitImageProcessor().save_pretrained(tmp_path)
    expected = model.dinov2(images()).last_hidden_state[:, 0].detach()
    found = PromptedEncoder(open_encoder(str(tmp_path)))(images())
    torch.testing.assert_close(found, expected, **FP32)
    values = dict(library="transformers", config=config.to_dict())
    found = PromptedEncoder(build_encoder(values, tmp_path))(images())
    torch.testing.assert_close(found, expected, **FP32)


def test_timm_checkpoints_and_other_image_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_224", **TIMM_SMALL, num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "t.safetensors")
    model = PromptedEncoder(build_encoder(timm_vit(), tmp_path / "t.safetensors"))
    expected = theirs.forward_head(theirs.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(model(images()), expected.detach(), **FP32)
    larger = timm_vit(img_size=48)
    model = PromptedEncoder(build_encoder(larger, tmp_path / "t.safetensors"))
    assert model(images(48)).shape == (5, 32)
    with pytest.raises(CheckpointError, match=r"(?s)12 unexpected.*: blocks\.2"):
        build_encoder(timm_vit(img_size=48, depth=2), tmp_path / "t.safetensors")


def test_resized_positions_keep_the_prefix_and_a_constant() -> None:
    positions = torch.cat([torch.randn(1, 2, 4), torch.full((1, 16, 4), 3.0)], dim=1)
    resized = resize_positions(positions, 2 + 36, 2)
    assert torch.equal(resized[:, :2], positions[:, :2])
    torch.testing.assert_close(resized[:, 2:], torch.full((1, 36, 4), 3.0))
    with pytest.raises(ValueError, match="16 positions to 7"):
        resize_positions(positions, 9, 2)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (dict(library="resnet"), "encoder library 'resnet'"),
        (
            dict(library="open_clip", architecture="ViT-B-17"),
            r"open_clip has no architecture ViT-B-17; did you mean .*ViT-B-16",
        ),
        (dict(library="open_clip", config=dict(width=3)), "expected embed_dim and vision_cfg"),
        (dict(library="timm", architecture="vit_none"), "encoder timm:vit_none"),
        (dict(library="timm", model="vit_none"), "unexpected keyword argument 'model'"),
        (dict(library="transformers", config=dict(model_type="bert")), "model_type 'bert'"),
        (
            dict(library="transformers", config=dict(model_type="vit"), feature="projected"),
            "no visual projection",
        ),
        (dict(library="own", architecture="resnet17000"), "no such network"),
        (dict(library="mm", arch="tiny"), "arch 'tiny'"),
        (dict(library="mm", arch=dict(width=3)), "embed_dims"),
    ],
)
def test_what_cannot_be_built(description: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(description)


@pytest.mark.parametrize(
    "description",
    [
        dict(library="open_clip", architecture="RN50"),
        dict(library="timm", architecture="resnet18"),
        dict(library="timm", architecture="convnext_atto"),
        dict(library="timm", architecture="swin_tiny_patch4_window7_224", arguments=SWIN),
        dict(library="own", architecture="ctranspath", arguments=SWIN),
    ],
    ids=["RN50", "resnet", "convnext", "swin", "ctranspath"],
)
def test_networks_without_blocks_work_wherever_no_prompt_is_needed(
    description: dict[str, Any],
) -> None:
    """Frozen features, LoRA and fine-tuning; prompts say which families take them."""
    torch.manual_seed(0)
    encoder = build_encoder(description)
    size = 224 if description.get("architecture") == "RN50" else 56
    pixels = torch.randn(2, 3, size, size)
    model = PromptedEncoder(encoder)
    expected = model(pixels)
    with torch.no_grad():
        assert torch.equal(expected, encoder.model.eval()(pixels))
    assert expected.shape == (2, encoder.embed_dim) and not expected.requires_grad
    with pytest.raises(ValueError, match=r"takes no prompts; expected 0; prompts are for Vision"):
        PromptedEncoder(build_encoder(description), prompt_length=1)
    names = set(model.state_dict())
    adapted = PromptedEncoder(encoder, lora=dict(r=2))
    torch.testing.assert_close(adapted(pixels), expected, **FP32)
    adapted(pixels).sum().backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    merge_lora(adapted.encoder)
    assert set(adapted.state_dict()) == names
    tuned = PromptedEncoder(build_encoder(description), frozen=False)
    tuned(pixels).sum().backward()
    assert any(p.grad is not None for p in tuned.parameters())


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such folder"):
        open_encoder(f"hf:{tmp_path / 'config.json'}")
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        build_encoder(VIT, tmp_path)
    (tmp_path / "c.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"c\.pt: cannot be read as a checkpoint"):
        build_encoder(VIT, tmp_path / "c.pt")


def write_mae(path: Path, *, tuned: bool) -> nn.Module:
    """What MAE's trainer stores: encoder and decoder, or after fine-tuning `fc_norm` and a head."""
    pool = "avg" if tuned else "token"
    model = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool=pool, **TIMM_SMALL)
    shake(model)
    state_dict = dict(model.state_dict())
    if tuned:
        state_dict |= {"head.weight": torch.zeros(2, 32), "head.bias": torch.zeros(2)}
    else:
        state_dict |= {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.ones(2)}
        state_dict |= {"decoder_blocks.0.norm1.weight": torch.ones(16)}
    torch.save({"model": state_dict, "epoch": 3}, path)
    return model.eval()


@pytest.mark.parametrize("tuned", [False, True])
def test_mae_with_its_decoder_and_fine_tuned(tuned: bool, tmp_path: Path) -> None:
    model = write_mae(tmp_path / "mae.pth", tuned=tuned)
    encoder = build_encoder(timm_vit(), tmp_path / "mae.pth")
    prompted = PromptedEncoder(encoder)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(prompted(images), model(images), **FP32)
    assert encoder.pools_class_token is not tuned
    again = build_encoder(encoder.spec)  # the pooling travels with the description
    assert again.pools_class_token is not tuned


def ctranspath_file(path: Path) -> nn.Module:
    """CTransPath in the layout of its release: timm 0.5.4's names and buffers, a classifier."""
    torch.manual_seed(0)
    model = ctranspath(**SWIN)
    shake(model)
    state = {
        re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name): tensor
        for name, tensor in model.state_dict().items()
    }
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    state["head.weight"] = torch.zeros(1000, 48)
    torch.save({"model": state}, path)
    return model.eval()


def test_ctranspath_without_prompts(tmp_path: Path) -> None:
    theirs = ctranspath_file(tmp_path / "ctranspath.pth")
    description = dict(library="own", architecture="ctranspath", arguments=SWIN)
    encoder = build_encoder(description, tmp_path / "ctranspath.pth")
    model = PromptedEncoder(encoder).train()
    pixels = images(56)
    torch.testing.assert_close(model(pixels), theirs(pixels).detach(), **FP32)
    assert not model(pixels).requires_grad
    assert build_encoder(json.loads(json.dumps(encoder.spec))).spec == encoder.spec
    trained = PromptedEncoder(build_encoder(description), frozen=False)
    trained(pixels).sum().backward()
    assert all(p.grad is not None for n, p in trained.named_parameters() if "norm.weight" in n)
    with pytest.raises(ValueError, match="takes no prompts"):
        PromptedEncoder(build_encoder(description), prompt_length=1)
    with pytest.raises(ValueError, match="56 x 56 px, found 64 x 64"):
        model(images(64))
    with pytest.raises(ValueError, match=r"timm:ctranspath: timm has no such model"):
        build_encoder(dict(library="timm", architecture="ctranspath"))


def test_weights_say_which_backbone_takes_them(tmp_path: Path) -> None:
    ctranspath_file(tmp_path / "ctranspath.pth")
    with pytest.raises(CheckpointError, match=r"of CTransPath: encoder='ctranspath'"):
        build_encoder(timm_vit(), tmp_path / "ctranspath.pth")
    torch.manual_seed(0)
    resnet = timm.create_model("resnet18", num_classes=5).eval()
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"of a ResNet: encoder='timm:resnet"):
        build_encoder(timm_vit(), tmp_path / "resnet.pth")
    description = dict(library="timm", architecture="resnet18")
    model = PromptedEncoder(build_encoder(description, tmp_path / "resnet.pth"))
    expected = resnet.forward_head(resnet.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(model(images()), expected.detach(), **FP32)
    half = {k: v for k, v in resnet.state_dict().items() if not k.startswith("layer4")}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"(?s)missing.*layer4\.0\.conv1\.weight"):
        build_encoder(description, tmp_path / "half.pth")
