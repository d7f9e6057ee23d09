"""Exported classifiers give the predictions of the trained ones, without MMClassification."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mmengine.config import Config

import cite.mm  # noqa: F401
from cite.mm.export import export_classifier, read_preprocessing
from cite.mm.feature_extraction import build_classifier, build_dataset
from cite.text_embeddings import TextEmbeddings, write_text_embeddings
from tests.cite.mm.gastric import make_gastric
from tests.cite.mm.test_features import make_config
from xtuner_add.cli import main

ROOT = Path(__file__).parents[3]
PREDICT = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmengine", "mmcls", "mmpretrain", "mmcv", "peft"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from cite import load_classifier
print(json.dumps(load_classifier(sys.argv[1]).predict(sys.argv[2:]).tolist()))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gastric(tmp_path_factory.mktemp("gastric"), slides=3, patches=1)


def config_of(kind: str, data: Path, tmp_path: Path) -> Config:
    settings = make_config(data)
    model = settings["model"]
    if kind == "cite":
        write_text_embeddings(
            tmp_path / "t.safetensors",
            TextEmbeddings(torch.randn(3, 16), torch.arange(3), tuple("abc"), tuple("abc")),
        )
        model["backbone"]["prompt_length"] = 2
        model["neck"] = dict(type="ProjectionNeck", in_features=48, out_features=16)
        model["head"] = dict(
            type="TextEmbeddingHead", text_embeddings=str(tmp_path / "t.safetensors")
        )
    if kind == "lora":
        model["backbone"]["lora"] = dict(r=2, init_lora_weights=False)
    return Config(settings)


@pytest.mark.parametrize("kind", ["cite", "linear", "lora"])
def test_equal_without_the_hosts(kind: str, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = config_of(kind, data, tmp_path)
    cfg.dump(tmp_path / "config.py")
    model, dataset = build_classifier(cfg, None), build_dataset(cfg, "test")
    items = [dataset[i] for i in range(3)]
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch = model.data_preprocessor(batch, False)
    with torch.no_grad():
        expected = model(**batch, mode="predict")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "c.pth")
    export_classifier(tmp_path / "config.py", str(tmp_path / "c.pth"), tmp_path / "out")
    paths = [item["data_samples"].img_path for item in items]
    result = subprocess.run(
        [sys.executable, "-c", PREDICT, str(tmp_path / "out"), *paths],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = torch.tensor(json.loads(result.stdout.splitlines()[-1]))
    scores = torch.stack([sample.pred_label.score for sample in expected])
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "classifier.json").read_text())
    assert config["classes"][0] == "Well differentiated tubular adenocarcinoma"


def test_what_cannot_be_exported(data: Path, tmp_path: Path) -> None:
    cfg = config_of("linear", data, tmp_path)
    cfg.model.data_preprocessor.to_rgb = True
    with pytest.raises(ValueError, match="to_rgb: expected False"):
        read_preprocessing(cfg)
    cfg.test_dataloader.dataset.pipeline[1] = dict(type="RandomFlip")
    with pytest.raises(ValueError, match="RandomFlip cannot be exported"):
        read_preprocessing(cfg)
    cfg = config_of("linear", data, tmp_path)
    cfg.model.backbone = dict(type="PrecomputedFeatures", embed_dim=48)
    cfg.dump(tmp_path / "config.py")
    model: Any = build_classifier(cfg, None)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    words = [str(tmp_path / name) for name in ("config.py", "c.pth", "out")]
    result = CliRunner().invoke(main, ["cite-export", *words])
    assert result.exit_code == 1
    assert "expected a backbone of cite.mm, found PrecomputedFeatures" in result.stderr
