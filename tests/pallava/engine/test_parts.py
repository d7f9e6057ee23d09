"""Every part by name: MMEngine's registries, XTuner's `BUILDER`, and `pallava.registry`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS
from torch import nn
from xtuner.registry import BUILDER

import pallava.engine  # noqa: F401  (what a config imports)
from pallava.model import build_encoder
from pallava.registry import CONNECTORS, ENCODERS
from tests.pallava.engine.tiny_run import save_encoder

SIZES = dict(visual_hidden_size=32, llm_hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=64)  # fmt: skip


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (MODELS, ("LLaVAModel", "PLIPVisionEncoder", "ScaleInvariantConnector",
                  "PLIPPretrainingModel", "SlideTokenEncoder")),
        (DATASETS, ("LLaVADataset",)),
        (HOOKS, ("EvaluateChatHook",)),
    ],
    ids=("models", "datasets", "hooks"),
)  # fmt: skip
def test_parts_are_found_by_name(registry: object, names: tuple[str, ...]) -> None:
    for name in names:
        assert registry.get(name) is not None  # type: ignore[attr-defined]
        assert BUILDER.get(name) is registry.get(name)  # type: ignore[attr-defined]


def test_parts_are_built_from_configs_in_both_styles(tmp_path: Path) -> None:
    save_encoder(tmp_path / "plip")
    (tmp_path / "config.py").write_text(
        'custom_imports = dict(imports=["pallava.engine"])\n'
        f'encoder = dict(type="PLIPVisionEncoder", folder={str(tmp_path / "plip")!r})\n'
        f'connector = dict(type="ScaleInvariantConnector", **{SIZES!r})\n'
        'slide = dict(type="SlideTokenEncoder", in_features=6, hidden_size=8, map_size=2)\n'
    )
    config = Config.fromfile(tmp_path / "config.py")
    for registry in (MODELS, BUILDER):
        encoder = registry.build(config.encoder)
        assert encoder.features(torch.zeros(1, 3, 32, 32)).shape[0] == 1
        assert registry.build(config.connector).config.llm_hidden_size == 16
        assert registry.build(config.slide).config.map_size == 2
    found = build_encoder(dict(config.encoder)).state_dict()
    by_class = MODELS.build(dict(type=type(encoder), config=encoder.config))
    by_class.load_state_dict(encoder.state_dict())
    for name, tensor in by_class.state_dict().items():
        assert torch.equal(tensor, found[name])


def test_short_names_and_strangers_parts_are_found_both_ways() -> None:
    connector = MODELS.build(dict(type="qformer_mlp", **SIZES))
    assert type(connector) is CONNECTORS.get("qformer_mlp")

    class StrangersEncoder(nn.Module):
        def __init__(self, folder: str) -> None:
            super().__init__()
            self.folder = folder

    MODELS.register_module(module=StrangersEncoder)
    try:
        assert ENCODERS.get("StrangersEncoder") is StrangersEncoder
        assert build_encoder("StrangersEncoder:somewhere").folder == "somewhere"
    finally:
        MODELS.module_dict.pop("StrangersEncoder")
    with pytest.raises(ValueError, match="unknown encoder 'StrangersEncoder'"):
        ENCODERS.get("StrangersEncoder")


def test_the_first_look_up_is_enough() -> None:
    code = (
        "import pallava.engine\n"
        "from xtuner.registry import BUILDER\n"
        "print(BUILDER.get('LLaVADataset').__name__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-1] == "LLaVADataset"
