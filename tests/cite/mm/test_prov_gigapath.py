"""Prov-GigaPath's tile encoder as a prompted backbone, from a folder in the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from cite.encoders import build_encoder
from cite.mm.backbones import PromptedEncoderBackbone
from pathcore.encoders import get_preset
from pathcore.weights import CheckpointError
from tests.gigapath.tiny_encoders import config, tiny_model, write_tile_encoder

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs" / "cite" / "gastric"
NAME = "cite_prov-gigapath_biolinkbert-l_1xb128-1k_gastric"
FACTS = json.loads(
    (ROOT / "tests" / "golden" / "gigapath" / "tile_encoder" / "tile_encoder.json").read_text()
)


def images(number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("safetensors", [True, False])
def test_without_prompts_it_is_the_tile_encoder(tmp_path: Path, safetensors: bool) -> None:
    folder = write_tile_encoder(tmp_path / "enc", safetensors=safetensors)
    with torch.no_grad():
        (found,) = PromptedEncoderBackbone(str(folder))(images())
        torch.testing.assert_close(found, tiny_model()(images()), atol=1e-5, rtol=1e-5)
    assert found.shape == (3, 48)


def test_prompts_alone_are_trained(tmp_path: Path) -> None:
    folder = write_tile_encoder(tmp_path / "enc")
    model = PromptedEncoderBackbone(
        str(folder), prompt_length=2, gradient_checkpointing=True, save_frozen=False
    )
    model(images())[0].square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"prompts.prompt"}
    assert (trained["prompts.prompt"].abs().amax(dim=2) > 0).all()  # type: ignore[union-attr]
    assert set(model.state_dict()) == {"prompt", "prompt_initialised"}


def test_released_names_and_shapes(tmp_path: Path) -> None:
    sizes = {k: FACTS["hyperparameters"][k] for k in ("img_size", "in_chans", "patch_size")}
    sizes |= {k: FACTS["hyperparameters"][k] for k in ("embed_dim", "depth", "num_heads")}
    sizes |= {k: FACTS["hyperparameters"][k] for k in ("init_values", "mlp_ratio", "num_classes")}
    preset = get_preset("prov-gigapath")
    assert {k: v for k, v in preset.arguments.items() if k in sizes} == {
        k: v for k, v in sizes.items() if k in preset.arguments
    }
    with torch.device("meta"):
        encoder = build_encoder(
            dict(library="timm", architecture=preset.architecture, arguments=preset.arguments)
        )
    found = {name: list(tensor.shape) for name, tensor in encoder.model.state_dict().items()}
    assert found == FACTS["state_dict"]
    encoder.take_apart()
    assert encoder.embed_dim == 1536 and len(encoder.blocks()) == 40


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        PromptedEncoderBackbone(str(tmp_path))
    with pytest.raises(TypeError, match="encoder"):
        PromptedEncoderBackbone()
    folder = write_tile_encoder(tmp_path / "enc")
    with pytest.raises(CheckpointError, match="missing"):
        PromptedEncoderBackbone(str(folder), arguments_of_encoder=dict(depth=3))
    (folder / "config.json").write_text('{"model_args": {}}')
    with pytest.raises(ValueError, match=r"nor a config\.json of timm"):
        PromptedEncoderBackbone(str(folder))
    (folder / "config.json").write_text(json.dumps(config(dict(embed_dim=48, img_size=32))))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="in this folder"):
        PromptedEncoderBackbone(str(folder), arguments_of_encoder=dict(depth=1))


def test_full_size_recipe() -> None:
    recipe = Config.fromfile(CONFIGS / f"{NAME}.py")
    assert recipe.model.backbone.type == "PromptedEncoder"
    assert recipe.model.backbone.encoder == "prov-gigapath@checkpoints/prov-gigapath"
    assert recipe.model.neck.in_features == 1536
    plain = Config.fromfile(CONFIGS / f"{NAME.replace('prov-gigapath', 'clip-vit-b16')}.py")
    assert recipe.train_dataloader == plain.train_dataloader
    assert recipe.model.head == plain.model.head


def test_tiny_recipe_trains(tmp_path: Path) -> None:
    """Once with random weights, as it stands, and once from a folder like the full-size recipe."""
    import mmcls.models  # noqa: F401

    from cite.mm.transforms import PackPatch

    bert = str(ROOT / "tests" / "golden" / "cite" / "tiny_bert")
    recipe = Config.fromfile(CONFIGS / f"{NAME}_tiny.py")
    recipe.model.head.text_encoder = dict(type="bert", model=bert)
    recipe.model.neck.out_features = 32
    full = Config.fromfile(CONFIGS / f"{NAME}.py").model.backbone
    folder = write_tile_encoder(tmp_path / "enc", img_size=224)
    pack = PackPatch(host="mmcls")
    batch = [
        pack({"img": np.full((224, 224, 3), 60 * k, np.uint8), "gt_label": k, "sample_idx": k})
        for k in range(3)
    ]
    data = {key: [sample[key] for sample in batch] for key in ("inputs", "data_samples")}
    for backbone in (recipe.model.backbone, {**full, "encoder": str(folder)}):
        settings: dict[str, Any] = {**recipe.model, "backbone": backbone}
        with DefaultScope.overwrite_default_scope("mmcls"):
            torch.manual_seed(0)
            model = MODELS.build(settings)
            wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
        before = {name: p.clone() for name, p in model.named_parameters()}
        model.train()
        losses = [float(model.train_step(data, wrapper)["loss"]) for _ in range(30)]
        moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        assert {name.split(".")[0] for name in moved} == {"backbone", "neck"}
        assert [n for n in moved if n.startswith("backbone")] == ["backbone.prompts.prompt"]
        assert losses[-1] < 0.9 * losses[0]
