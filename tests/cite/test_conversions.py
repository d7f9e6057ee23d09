"""Converted weights give equal outputs in the other library, and convert back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from cite.conversions import SOURCES, TARGETS, ConversionError, convert
from cite.encoders import build_encoder
from cite.prompted import PromptedEncoder
from pathcore.weights import read_state_dict
from tests.cite.goldens import CLIP, FP32, VIT_ARCH
from xtuner_add.cli import main

SIZES = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2, num_classes=0)
HF_SIZES = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=3)
HF_SIZES |= dict(num_attention_heads=2, intermediate_size=256)


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def timm_vit(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", **SIZES, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def encode(library: str, state_dict: dict[str, Tensor], **arguments: Any) -> Tensor:
    encoder = build_encoder(dict(library=library, **arguments))
    encoder.model.load_state_dict(state_dict)
    return PromptedEncoder(encoder)(images())


def test_vit_to_mm_and_hugging_face() -> None:
    model = timm_vit()
    expected, state = model(images()).detach(), model.state_dict()
    mm = convert(state, "timm", "mm")
    found = encode("mm", mm, arch=VIT_ARCH, img_size=32, patch_size=8)
    torch.testing.assert_close(found, expected, **FP32)
    config = {"model_type": "vit", **HF_SIZES, "layer_norm_eps": 1e-6}
    hf = convert(mm, "mm", "hf-vit")
    torch.testing.assert_close(encode("transformers", hf, config=config), expected, **FP32)
    for back in (convert(hf, "hf-vit", "timm"), convert(mm, "mm", "timm")):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_dinov2() -> None:
    model = timm_vit(init_values=1e-1)
    hf = convert(model.state_dict(), "timm", "hf-dinov2")
    config = {"model_type": "dinov2", **HF_SIZES, "layer_norm_eps": 1e-6}
    found = encode("transformers", hf, config=config)
    torch.testing.assert_close(found, model(images()).detach(), **FP32)
    back = convert(hf, "hf-dinov2", "timm")
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


DINOV2: dict[str, Any] = dict(img_size=28, embed_dim=32, depth=2, num_heads=2, num_classes=0)
HF_DINOV2: dict[str, Any] = dict(image_size=28, patch_size=14, hidden_size=32)
HF_DINOV2 |= dict(num_hidden_layers=2, num_attention_heads=2, layer_norm_eps=1e-6)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_with_registers_and_swiglu(registers: bool, swiglu: bool) -> None:
    size = "giant" if swiglu else "base"
    # SwiGLU's hidden width in transformers: two thirds of 4 x 32, rounded up to a multiple of 8.
    options = {**DINOV2, "mlp_ratio": 2 * 88 / 32} if swiglu else DINOV2
    name = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    pixels = torch.randn(2, 3, 28, 28)
    expected, state = model(pixels).detach(), model.state_dict()
    values = {**HF_DINOV2, "use_swiglu_ffn": swiglu}
    if registers:
        values["num_register_tokens"] = 4
    kind = "dinov2_with_registers" if registers else "dinov2"
    theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **values))
    hf = convert(state, "timm", "hf-dinov2")
    report = theirs.eval().load_state_dict(hf, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == ["embeddings.mask_token"]
    found = theirs(pixels).last_hidden_state[:, 0].detach()
    torch.testing.assert_close(found, expected, **FP32)

    back = convert(theirs.state_dict(), "hf-dinov2", "timm")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items())
    # Meta's release: its own names, a position for the class token, a mask token.
    official = {
        k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if swiglu else k: v
        for k, v in state.items()
    } | {"mask_token": torch.zeros(1, 32)}
    if registers:
        official["register_tokens"] = official.pop("reg_token")
        positions = official["pos_embed"]
        official["pos_embed"] = torch.cat([torch.ones(1, 1, 32), positions], dim=1)
        official["cls_token"] = official["cls_token"] - 1
    theirs.load_state_dict(convert(official, "timm", "hf-dinov2"), strict=False)
    found = theirs(pixels).last_hidden_state[:, 0].detach()
    torch.testing.assert_close(found, expected, **FP32)


def test_what_mae_and_dino_store_beside_the_encoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RETFound is MAE with its decoder, optimizer and arguments; HIPT a DINO teacher."""
    state = timm_vit().state_dict()
    decoder = {f"decoder_{part}": torch.zeros(2) for part in ("pos_embed", "blocks.0.norm1.weight")}
    expected = convert(state, "timm", "mm")
    checkpoints = {
        "mae": {"model": {**state, "mask_token": torch.zeros(1, 1, 4), **decoder}},
        "hipt": {
            "student": {f"module.backbone.{k}": -v for k, v in state.items()},
            "teacher": {f"backbone.{k}": v for k, v in state.items()}
            | {"head.mlp.0.weight": torch.zeros(2)},
            "args": argparse.Namespace(arch="vit_small"),
        },
        "dinov2": {
            "teacher": {
                f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in state.items()
            }
            | {"dino_head.mlp.0.weight": torch.zeros(2)}
        },
    }
    for name, content in checkpoints.items():
        torch.save(content, tmp_path / name)
        found = convert(read_state_dict(tmp_path / name), "timm", "mm")
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert "Dropped 3 tensors that only training uses: decoder_blocks, decoder_pos_embed" in (
        caplog.text
    )


def test_weights_that_pool_their_patches_are_not_converted() -> None:
    """MAE fine-tunes on the mean of the patches, with `fc_norm` in place of `norm`."""
    state = timm_vit(global_pool="avg").state_dict()
    assert "fc_norm.weight" in state and "norm.weight" not in state
    for target in ("mm", "hf-vit"):
        with pytest.raises(ConversionError, match="mean of the patches"):
            convert(state, "timm", target)


def test_two_encoders_in_one_file_are_not_chosen_from() -> None:
    state = timm_vit().state_dict()
    both = {f"student.{k}": v for k, v in state.items()} | {f"ema.{k}": v for k, v in state.items()}
    with pytest.raises(ConversionError, match=r"expected one ViT .* found 2"):
        convert(both, "timm", "mm")
    with pytest.raises(ConversionError, match=r"found 0"):
        convert({"layer1.0.conv1.weight": torch.zeros(1)}, "timm", "mm")


def test_clip_and_back() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(CLIP)
    state = encoder.model.state_dict()
    hf = convert({f"visual.{k}": v for k, v in state.items()}, "clip", "hf-clip")
    values = HF_SIZES | dict(hidden_size=128, intermediate_size=512, hidden_act="quick_gelu")
    config = transformers.CLIPVisionConfig(**values, projection_dim=48)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    report = theirs.load_state_dict(hf, strict=False)
    assert not report.unexpected_keys
    assert [k for k in report.missing_keys if "position_ids" not in k] == []
    expected = PromptedEncoder(encoder)(images())
    torch.testing.assert_close(theirs(images()).image_embeds.detach(), expected, **FP32)
    back = convert(hf | {"logit_scale": torch.ones(())}, "hf-clip", "clip")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def moco_checkpoint() -> dict[str, Tensor]:
    state = timm_vit().state_dict()
    moco = {f"module.base_encoder.{k}": v for k, v in state.items()}
    moco |= {f"module.momentum_encoder.{k}": -v for k, v in state.items()}
    moco |= {"module.base_encoder.head.0.weight": torch.ones(4, 64)}
    return moco | {"module.predictor.0.weight": torch.ones(4, 4)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_moco_by_command(suffix: str, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": moco_checkpoint()}, tmp_path / "moco.pth")
    out = tmp_path / f"mm.{suffix}"
    command = ["cite-convert", str(tmp_path / "moco.pth"), str(out)]
    command += ["--from", "moco-v3", "--to", "mm"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    mm = load_file(out) if suffix != "pth" else torch.load(out, weights_only=True)["state_dict"]
    found = encode("mm", mm, arch=VIT_ARCH, img_size=32, patch_size=8)
    torch.testing.assert_close(found, timm_vit()(images()).detach(), **FP32)
    command[-1] = "clip"
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "no conversion from 'moco-v3' to 'clip'" in result.stderr


def test_weights_of_another_format_are_refused() -> None:
    state = timm_vit().state_dict()
    with pytest.raises(ConversionError, match=r"patch_embed\.proj\.weight: not a name of MMPre"):
        convert(state, "mm", "timm")
    with pytest.raises(ConversionError, match=r"base_encoder"):
        convert(state, "moco-v3", "mm")
    hf = convert(state, "timm", "hf-vit")
    del hf["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(ConversionError, match=r"key\.bias'\] are not"):
        convert(hf, "hf-vit", "timm")
    for name in set(SOURCES) & set(TARGETS):
        with pytest.raises(ConversionError, match=f"no conversion from '{name}' to '{name}'"):
            convert({}, name, name)
