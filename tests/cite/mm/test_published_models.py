"""The published table of foundation models, as docs/cite.md says, on made-up weights."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

import cite.mm  # noqa: F401
from pathcore.encoders.networks import ctranspath
from pathcore.weights import CheckpointError
from tests.docs.reading import ROOT

SMALL: dict[str, Any] = dict(img_size=56, embed_dim=32, depth=2, num_heads=2)
SWIN: dict[str, Any] = dict(img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 4))


def documented() -> dict[str, dict[str, Any]]:
    text = (ROOT / "docs/cite.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "published = {" in b]
    found: dict[str, Any] = {}
    exec(block, found)
    return found["published"]  # type: ignore[no-any-return]


def random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def vit(name: str, **more: Any) -> nn.Module:
    return random(timm.create_model(name, num_classes=0, **{**SMALL, **more}))


def with_decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
    }
    return {**state, **decoder}


def write(name: str, file: Path) -> nn.Module:
    """Writes what the model's authors publish; returns the network."""
    args = argparse.Namespace(lr=1e-3, data_path="/data")
    if name == "REMEDIS":
        model = random(timm.create_model("resnetv2_50x1_bit", num_classes=0))
        content: Any = model.state_dict()
    elif name == "CTransPath":
        model = random(ctranspath(**SWIN))
        old = {  # timm 0.5.4 put a downsampling layer at the end of its stage
            re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", key): tensor
            for key, tensor in model.state_dict().items()
        }
        old["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
        content = {"model": old | {"head.weight": torch.zeros(1000, 48)}}
    elif name == "HIPT":
        model = vit("vit_small_patch16_224")
        state = model.state_dict()
        student = {f"module.backbone.{key}": torch.zeros_like(t) for key, t in state.items()}
        teacher = {f"backbone.{key}": tensor for key, tensor in state.items()}
        head = {"head.mlp.0.weight": torch.zeros(4, 32)}
        content = {"student": student, "teacher": teacher | head, "epoch": 9, "args": args}
    elif name == "DINOv2":
        model = vit("vit_base_patch14_reg4_dinov2")
        content = dict(model.state_dict())
        positions = content["pos_embed"]
        content["register_tokens"] = content.pop("reg_token")
        content["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
        content["mask_token"] = torch.zeros(1, 32)
    elif name == "ViT":
        from safetensors.torch import save_file

        model = random(timm.create_model("vit_base_patch16_224", num_classes=7, **SMALL))
        save_file(model.state_dict(), file)
        model.reset_classifier(0)
        return model
    else:
        model = vit("vit_large_patch16_224" if name == "RETFound" else "vit_base_patch16_224")
        content = {"model": with_decoder(model.state_dict())}
        if name == "RETFound":
            content |= {"optimizer": {"state": {}}, "epoch": 7, "scaler": {}, "args": args}
    torch.save(content, file)
    return model


@pytest.mark.parametrize("name", documented())
def test_a_documented_snippet_reads_what_its_authors_publish(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snippet = documented()[name]
    encoder = snippet["encoder"]
    file = snippet.get("checkpoint") or encoder.partition("@")[2]
    expected = write(name, tmp_path / file)
    if isinstance(encoder, str):
        snippet["arguments_of_encoder"] = SWIN if name == "CTransPath" else SMALL
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    backbone = MODELS.build(dict(type="PromptedEncoder", **snippet))
    with torch.no_grad():
        torch.testing.assert_close(backbone(pixels)[0], expected(pixels), rtol=1e-4, atol=1e-4)
    prompted = dict(type="PromptedEncoder", **snippet, prompt_length=1)
    if name in ("REMEDIS", "CTransPath"):
        with pytest.raises(ValueError, match="takes no prompts"):
            MODELS.build(prompted)
    else:
        assert MODELS.build(prompted)(pixels)[0].requires_grad


def test_what_is_not_carried_is_recognised(tmp_path: Path) -> None:
    text = (ROOT / "docs/cite.md").read_text(encoding="utf-8")
    rows = ("REMEDIS", "RETFound", "CTransPath", "HIPT", "INTERN-2.5", "DINOv2", "MAE", "ViT")
    assert all(re.search(rf"^\| .*\b{re.escape(name)}\b.* \|", text, re.M) for name in rows)
    layers = {f"levels.0.blocks.0.dcn.{part}.weight": torch.zeros(1) for part in ("offset", "mask")}
    torch.save({"model": layers}, tmp_path / "internimage_b_1k_224.pth")
    vit_b = dict(library="timm", architecture="vit_base_patch16_224", arguments=SMALL)
    for file, message in (
        ("internimage_b_1k_224.pth", r"weights of InternImage.*github\.com/OpenGVLab/InternImage"),
        ("path-50x1-remedis-m", r"a SavedModel of TensorFlow, as REMEDIS is published"),
    ):
        if not file.endswith(".pth"):
            (tmp_path / file).mkdir()
            (tmp_path / file / "saved_model.pb").write_bytes(b"\x08\x01")
        with pytest.raises(CheckpointError, match=message):
            MODELS.build(
                dict(type="PromptedEncoder", encoder=vit_b, checkpoint=str(tmp_path / file))
            )
