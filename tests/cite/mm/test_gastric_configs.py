"""The published matrix: every cell is there, says what its name says, and builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope

from cite.mm.datasets import GASTRIC_CLASSES

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "configs" / "cite" / "gastric"
GOLDEN = ROOT / "tests" / "golden" / "cite"
TRAINED = {
    "cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric": 0.03,
    "linear_clip-vit-b16_1xb128-1k_gastric": 1e-2,
    "vpt_clip-vit-b16_1xb128-1k_gastric": 1e-2,
    "finetune_clip-vit-b16_1xb128-1k_gastric": 1e-5,
    "lora_clip-vit-b16_1xb128-1k_gastric": 1e-2,
}
PUBLISHED = [name for name in TRAINED if not name.startswith("lora")]
ZERO_SHOT = "zeroshot_clip-vit-b16_gastric"


def read(name: str) -> Any:
    return Config.fromfile(FOLDER / f"{name}.py")


def build(name: str, host: str = "mmcls") -> Any:
    config = read(name)
    head = config.model.head
    if "text_encoder" in head:
        head.text_encoder = dict(type="bert", model=str(GOLDEN / "tiny_bert"))
        if config.model.get("neck"):
            config.model.neck.out_features = 32
        else:
            config.model.backbone.encoder.config.embed_dim = 32
    if host == "mmcls":
        import mmcls.models  # noqa: F401
    else:
        import mmpretrain.models  # noqa: F401
    with DefaultScope.overwrite_default_scope(host):
        torch.manual_seed(0)
        return config, MODELS.build(config.model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_number_of_slides(name: str) -> None:
    whole = read(name)
    assert whole.train_dataloader.dataset.ann_file == "gastric_cls3_ann/train_all_0.2.txt"
    for number in (1, 2, 4, 8, 16):
        cell = read(f"{name}-{number}")
        assert cell.train_dataloader.dataset.ann_file == f"gastric_cls3_ann/train_{number}_0.2.txt"
        cell.train_dataloader.dataset.ann_file = whole.train_dataloader.dataset.ann_file
        assert cell.to_dict() == whole.to_dict()


@pytest.mark.parametrize("number", [1, 2, 4, 8, 16])
def test_zero_shot_does_not_depend_on_the_number(number: int) -> None:
    assert read(f"{ZERO_SHOT}-{number}").to_dict() == read(ZERO_SHOT).to_dict()


@pytest.mark.parametrize("name", [*TRAINED, ZERO_SHOT])
def test_recipe(name: str) -> None:
    config = read(name)
    assert config.test_dataloader.dataset.test_mode
    assert [step["type"] for step in config.test_dataloader.dataset.pipeline] == [
        *("LoadPatch", "ResizePatch", "PackPatch"),
    ]
    if name in TRAINED:
        assert config.optim_wrapper.optimizer == dict(type="SGD", lr=TRAINED[name])
        balanced = config.train_dataloader.sampler.type == "PatchBalancedSampler"
        assert balanced == name.startswith("cite")


@pytest.mark.parametrize("host", ["mmcls", "mmpretrain"])
@pytest.mark.parametrize("name", TRAINED)
def test_kind_trains_what_it_names(name: str, host: str) -> None:
    from cite.mm.transforms import PackPatch

    config, model = build(f"{name}_tiny", host)
    pack = PackPatch(host=host)
    batch = [
        pack({"img": np.full((224, 224, 3), 60 * k, np.uint8), "gt_label": k, "sample_idx": k})
        for k in range(3)
    ]
    data = {key: [sample[key] for sample in batch] for key in ("inputs", "data_samples")}
    with DefaultScope.overwrite_default_scope(host):
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    assert model.train_step(data, wrapper)["loss"] > 0
    after = model.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    kind = name.split("_")[0]
    if kind == "finetune":
        assert {n.split(".")[0] for n in moved} == {"backbone", "head"}
        assert len([n for n in moved if n.startswith("backbone.")]) > 10
        return
    parts = {"linear": "head", "vpt": "head", "lora": "head", "cite": "neck"}
    assert any(n.startswith(parts[kind]) for n in moved)
    in_backbone = {n for n in moved if n.startswith("backbone.")}
    if kind == "linear":
        assert not in_backbone
    elif kind == "lora":
        assert in_backbone
        assert all("lora" in n for n in in_backbone)
    else:
        assert any(n.endswith("prompt") for n in in_backbone)
        assert all("prompt" in n for n in in_backbone)


def test_order_of_the_classes_survives_a_dump(tmp_path: Path) -> None:
    """MMEngine sorts the keys of what it writes beside every run."""
    for name in ("cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric", ZERO_SHOT):
        config = read(name)
        config.dump(tmp_path / f"{name}.py")
        dumped = Config.fromfile(tmp_path / f"{name}.py")
        assert list(dumped.model.head.texts) == list(GASTRIC_CLASSES)
        assert dumped.to_dict() == config.to_dict()


def test_zero_shot_predicts_without_training() -> None:
    _, model = build(f"{ZERO_SHOT}_tiny")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        scores = model.eval()(torch.rand(2, 3, 224, 224))
    assert scores.shape == (2, 3)


@pytest.mark.parametrize("name", [*PUBLISHED, ZERO_SHOT])
def test_mmpretrain_differs_in_the_host_alone(name: str) -> None:
    here, there = read(name), read(f"{name}-mmpretrain")
    assert there.default_scope == "mmpretrain"
    assert there.visualizer.type == "UniversalVisualizer"
    there.default_scope = here.default_scope
    there.visualizer.type = here.visualizer.type
    assert there.to_dict() == here.to_dict()


def test_published_learning_rate() -> None:
    config = read("cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(scheduler), default_args={"optimizer": optimizer})
        for scheduler in config.param_scheduler
    ]
    rates = []
    for _ in range(config.train_cfg.max_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    np.testing.assert_allclose(rates, np.load(GOLDEN / "lr_schedule.npy"), rtol=1e-10)
