"""The estimate of memory before a training, against what a CPU allocates in a training step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from mmengine.config import Config
from torch.profiler import ProfilerActivity, profile
from xtuner.registry import BUILDER

from pallava.engine.planning import Batch, TrainingPlan, ZeroStage, four_bit_bytes
from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.pallava.engine.llm_sizes import save_config
from tests.pallava.engine.tiny_run import CONFIGS, STAGE1, make_folder
from xtuner_add import cli

TOLERANCE = 0.1
"""Relative difference of estimated and measured activations."""

SETTINGS: tuple[tuple[int, int, ZeroStage], ...] = ((1, 1, 0), (6, 16, 2))
"""Samples per GPU, GPUs and ZeRO stage of the documented table."""

CPU = {"optim_wrapper.type": "OptimWrapper", "model.num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("plan"), num_images=4)


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def batch_of(text_tokens: int, sub_images: int, samples: int) -> dict[str, Any]:
    ids = torch.ones(samples, 1 + text_tokens, dtype=torch.long)
    ids[:, 0] = IMAGE_TOKEN_INDEX
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1:, -1] = False  # padding, so that attention gets a mask
    labels = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX).masked_fill(~mask, -100)
    images = [torch.randn(1 + sub_images, 3, 32, 32) for _ in range(samples)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": images}


def measured_peak(model: Any, data: dict[str, Any]) -> int:
    """What the allocator of a CPU holds at the peak of forward and backward.

    The encoder's two paths for CPUs, which bound and speed up its work, are switched off.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    model(data)["loss"].backward()  # libraries allocate buffers once
    # Held until the profile ends: the profiler forgets no address, and counts the release of a
    # tensor older than itself where an earlier profile had recorded another one at that place.
    images = data["pixel_values"]
    with (
        patch("pallava.modeling.plip._CPU_BATCH", 1000),
        torch.backends.mkldnn.flags(enabled=False),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        data["pixel_values"] = [image.clone() for image in images]
        model(data)["loss"].backward()
    events = profiled.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, size in steps:
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("text_tokens", "sub_images", "samples"), [(12, 8, 4), (200, 4, 2), (64, 0, 3)]
)
def test_activations_are_what_a_cpu_allocates(
    text_tokens: int, sub_images: int, samples: int, checkpointing: bool
) -> None:
    cross = {"model.cross_attention": sub_images > 0}
    plan = TrainingPlan(STAGE1, options=CPU | cross)
    cfg = Config.fromfile(STAGE1)
    cfg.merge_from_dict(CPU | cross)
    model = BUILDER.build(cfg.model).train()
    if not checkpointing:
        model.activation_checkpointing_disable()
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in plan.model.named_parameters()
    }
    measured = measured_peak(model, batch_of(text_tokens, sub_images, samples))
    estimated = plan.activations(
        Batch(samples, sub_images, text_tokens), checkpointing=checkpointing
    )
    print(measured, estimated, estimated / measured)
    assert estimated == pytest.approx(measured, rel=TOLERANCE)


def test_four_bits_are_what_bitsandbytes_stores() -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(96, 130)
    for double in (True, False):
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        stored = packed.nbytes + state.absmax.nbytes
        if double:
            stored += state.state2.absmax.nbytes
        assert four_bit_bytes(weight, double_quantised=double) == stored


def test_four_bits_hold_the_linear_layers_of_the_language_model_alone(folder: Path) -> None:
    plan = TrainingPlan(
        CONFIGS / "pallava_qlora_domain_alignment.py",
        llm="data/tiny/llama",
        visual_encoder="data/tiny/plip",
    )
    llm = next(part for part in plan.parts() if part.name == "llm")
    config = plan.model.llm.config
    kept = 2 * config.vocab_size * config.hidden_size
    kept += (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert llm.dtypes["4 bits"] == llm.parameters - llm.trained - kept
    full = TrainingPlan(
        CONFIGS / "pallava_domain_alignment.py",
        llm="data/tiny/llama",
        visual_encoder="data/tiny/plip",
    )
    saved = next(part for part in full.parts() if part.name == "llm").held_bytes - llm.held_bytes
    assert saved > 0
    with pytest.raises(ValueError, match="ZeRO-3 cannot"):
        plan.estimate(Batch(1, 0, 8), zero=3)


def test_deepspeed_partitions_what_its_stage_says() -> None:
    plan = TrainingPlan(STAGE1)
    trained = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in plan.model.parameters())
    batch = Batch(2, 4, 16)
    none, two, three = (plan.estimate(batch, gpus=4, zero=stage) for stage in (0, 2, 3))
    assert (none.gradients, none.optimizer) == (4 * trained, 8 * trained)
    assert (two.weights, two.gradients, two.optimizer) == (
        2 * every,
        2 * trained // 4,
        12 * trained // 4,
    )
    assert three.weights == 2 * every // 4 and three.buffers > two.buffers > none.buffers


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, ["plan", *map(str, arguments)])
    return result.exit_code, result.output


def test_command_needs_no_weights(tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "data/tiny/llama/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    arguments = ("pallava_domain_alignment", "--llm", tmp_path, "--text-tokens", 20)
    code, output = invoke(*arguments, "--cfg-options", "train_dataloader.dataset.max_length=40")
    assert code == 0, output
    assert "checkpoints/plip does not exist: assumed PLIP's ViT-B/16" in output
    assert "6 samples with 1 image of 8 sub-images" in output
    for row in ("weights", "activations", "total", "24 GiB", "80 GiB"):
        assert len(next(line for line in output.splitlines() if line.startswith(row)).split()) >= 5
    assert output.count("fits") >= 12
    for option, message, expected in (
        ("train_dataloder.batch_size=64", "did you mean train_dataloader", 2),
        ("model.pretraind_pth=x.pth", "did you mean pretrained_pth", 2),
        ("model.llm_lora.rank=64", "unexpected keyword argument 'rank'", 1),
    ):
        code, output = invoke(*arguments, "--cfg-options", option)
        assert code == expected and message in output, output


def test_missing_language_model_is_named(tmp_path: Path) -> None:
    code, output = invoke("pallava_domain_alignment", "--llm", tmp_path / "absent")
    assert code == 1 and "absent" in output and "--llm FOLDER" in output
    code, output = invoke("pallava_domain_alignment")  # without network
    assert code == 1 and "meta-llama/Meta-Llama-3-8B-Instruct" in output
    assert invoke("pallava_domain_alinment")[0] == 2
    code, output = invoke("plip_pretraining")
    assert code == 2 and "model.llm" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm3_3b", "mistral_7b"])
def test_documented_memory_is_what_is_computed(name: str, tmp_path: Path) -> None:
    plan = TrainingPlan(
        CONFIGS / f"pallava_{name}_domain_alignment.py", llm=str(save_config(name, tmp_path))
    )
    found = [
        plan.estimate(Batch(samples, 8, tokens), gpus=gpus, zero=zero).total / 2**30
        for samples, gpus, zero in SETTINGS
        for tokens in (256, 1852)
    ]
    text = (CONFIGS.parents[1] / "docs/pallava_models.md").read_text()
    row = re.search(rf"^\| `{name}` ((?:\| \d+ )+)\|$", text, re.MULTILINE)
    assert row and [int(value) for value in row[1].split("|")[1:]] == [round(v) for v in found]
