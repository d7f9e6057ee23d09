"""Checkpoints as their trainers write them, loaded strictly into timm's networks."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pathcore.encoders.layouts import fit_layout, pools_patches
from pathcore.encoders.networks import KeepImageTower, ctranspath
from pathcore.weights import CheckpointError, load_strict, read_state_dict

TINY: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=4, num_classes=0)
SWIN: dict[str, Any] = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), img_size=56)


def vit(**more: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, "img_size": 64, **more}).eval()


def random_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.randn_like(t) if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }


def with_decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's pretraining file: the encoder, and what reconstructs the masked patches."""
    return {
        **state,
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(16),
        "decoder_pred.bias": torch.zeros(768),
    }


def official_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the DINOv2 repository, whose position embedding has a row for the class token."""
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"]
    swiglu = fc1.shape[0] == 2 * fc2.shape[1]
    official = {"mask_token": torch.zeros(1, 32)}
    for name, tensor in state.items():
        if swiglu:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if name == "pos_embed" and "reg_token" in state:
            tensor = torch.cat([torch.zeros(1, 1, 32), tensor], 1)
        official["register_tokens" if name == "reg_token" else name] = tensor
    return official


def loaded(model: nn.Module, path: Path) -> dict[str, Tensor]:
    fitted = fit_layout(read_state_dict(path), model)
    load_strict(model, fitted.state_dict, what="encoder", source=path)
    return model.state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_mae_with_its_decoder_and_retfound_with_its_arguments(tmp_path: Path) -> None:
    state = random_weights(vit())
    torch.save({"model": with_decoder(state)}, tmp_path / "mae.pth")
    args = argparse.Namespace(lr=1e-3, data_path="/data", distributed=True)
    content = {"model": with_decoder(state), "optimizer": {"state": {}}, "epoch": 7, "args": args}
    torch.save(content, tmp_path / "RETFound.pth")
    for name in ("mae.pth", "RETFound.pth"):
        assert equal(loaded(vit(), tmp_path / name), state), name
    fitted = fit_layout(read_state_dict(tmp_path / "mae.pth"), vit())
    assert "5 tensors that it has no use for" in fitted.describe()
    assert "decoder_pred" in fitted.describe()


def test_a_model_tuned_on_the_mean_of_its_patches_says_so(tmp_path: Path) -> None:
    state = random_weights(vit(global_pool="avg"))
    torch.save({"model": {**state, "head.weight": torch.zeros(5, 32)}}, tmp_path / "tuned.pth")
    found = read_state_dict(tmp_path / "tuned.pth")
    assert pools_patches(found) and not pools_patches(random_weights(vit()))
    assert equal(loaded(vit(global_pool="avg"), tmp_path / "tuned.pth"), state)
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight"):
        loaded(vit(), tmp_path / "tuned.pth")


def test_dino_teacher_and_student(tmp_path: Path) -> None:
    teacher, student = random_weights(vit(), 1), random_weights(vit(), 2)
    head = torch.zeros(4, 32)
    content = {
        "student": {
            **{f"module.backbone.{n}": t for n, t in student.items()},
            "module.head.mlp.0.weight": head,
        },
        "teacher": {**{f"backbone.{n}": t for n, t in teacher.items()}, "head.mlp.0.weight": head},
        "args": argparse.Namespace(arch="vit_small"),
    }  # fmt: skip
    torch.save(content, tmp_path / "vit256.pth")
    assert equal(loaded(vit(), tmp_path / "vit256.pth"), teacher)


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
             "vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"],
)  # fmt: skip
def test_dinov2_by_its_official_names(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return timm.create_model(name, **{**TINY, "img_size": 56})

    state = random_weights(build())
    torch.save(official_dinov2(state), tmp_path / "dinov2.pth")
    assert equal(loaded(build(), tmp_path / "dinov2.pth"), state)
    chunked = {
        re.sub(r"^blocks\.", "blocks.0.", f"{n}"): t for n, t in official_dinov2(state).items()
    }
    teacher = {f"backbone.{n}": t for n, t in chunked.items()}
    torch.save(
        {"teacher": {**teacher, "dino_head.mlp.0.weight": torch.zeros(2)}}, tmp_path / "own.pth"
    )
    assert equal(loaded(build(), tmp_path / "own.pth"), state)


def test_ctranspath_by_the_names_of_its_own_timm(tmp_path: Path) -> None:
    """timm 0.5.4 put a downsampling layer at the end of its stage, later versions in the next."""
    state = random_weights(ctranspath(**SWIN))
    old = {
        re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name): t
        for name, t in state.items()
    }
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    old["head.weight"] = torch.zeros(1000, 48)
    assert any("layers.0.downsample" in name for name in old)
    torch.save({"model": old}, tmp_path / "ctranspath.pth")
    assert equal(loaded(ctranspath(**SWIN), tmp_path / "ctranspath.pth"), state)


def test_keep_with_the_layer_scale_that_transformers_renamed(tmp_path: Path) -> None:
    tower = KeepImageTower(**{**TINY, "img_size": 64, "projection_dim": 16})
    state = random_weights(tower)
    stored = {re.sub(r"\.(ls\d)\.gamma", r".\1.weight", name): t for name, t in state.items()}
    stored |= {"text.embeddings.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    torch.save(stored, tmp_path / "keep.bin")
    fresh = KeepImageTower(**{**TINY, "img_size": 64, "projection_dim": 16})
    fitted = fit_layout(read_state_dict(tmp_path / "keep.bin"), fresh)
    load_strict(fresh, fitted.state_dict, what="KEEP")
    assert equal(fresh.state_dict(), state)


def test_positions_are_resized_and_nothing_is_made_up(tmp_path: Path) -> None:
    torch.save(random_weights(vit(img_size=32)), tmp_path / "small.pth")
    assert loaded(vit(), tmp_path / "small.pth")["pos_embed"].shape == (1, 17, 32)
    half = {n: t for n, t in random_weights(vit()).items() if not n.startswith("blocks.1.")}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.norm1\.weight"):
        loaded(vit(), tmp_path / "half.pth")
