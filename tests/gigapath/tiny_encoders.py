"""Small twins of the released tile encoders, in the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

TINY_ARGS: dict[str, Any] = dict(
    img_size=32,
    in_chans=3,
    patch_size=16,
    embed_dim=48,
    depth=2,
    num_heads=4,
    init_values=1e-05,
    mlp_ratio=5.33334,
    num_classes=0,
)


def tiny_model(seed: int = 0, **changes: Any) -> nn.Module:
    """The released topology, so small that a tile takes no time; tiles differ in its embeddings."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model("vit_giant_patch14_dinov2", **{**TINY_ARGS, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif name.endswith("gamma"):
                parameter.fill_(0.5)
    return model.eval()


def config(model_args: dict[str, Any]) -> dict[str, Any]:
    """`config.json` with the keys of the published one."""
    return {
        "architecture": "vit_giant_patch14_dinov2",
        "num_classes": 0,
        "num_features": model_args["embed_dim"],
        "global_pool": "token",
        "model_args": model_args,
        "pretrained_cfg": {
            "tag": "",
            "custom_load": False,
            "input_size": [3, model_args["img_size"], model_args["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_tile_encoder(
    folder: Path, *, seed: int = 0, safetensors: bool = False, **changes: Any
) -> Path:
    """Writes a folder as timm's models lie on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    model_args = {**TINY_ARGS, **changes}
    state_dict = tiny_model(seed, **changes).state_dict()
    (folder / "config.json").write_text(json.dumps(config(model_args)))
    if safetensors:
        save_file(state_dict, folder / "model.safetensors")
    else:
        torch.save(state_dict, folder / "pytorch_model.bin")
    return folder


def write_hub_cache(cache: Path, repository: str, files: dict[str, Path]) -> None:
    """Puts files into a hub cache as a download leaves them."""
    revision = "0" * 40
    base = cache / f"models--{repository.replace('/', '--')}"
    snapshot = base / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(revision)
    for name, source in files.items():
        (snapshot / name).symlink_to(source)
