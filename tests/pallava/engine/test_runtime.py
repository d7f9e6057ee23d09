"""Adapting configs for CUDA and fp16 to a machine without a GPU."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIMIZERS
from torch import nn
from torch.optim import AdamW

from pallava.engine import runtime
from pallava.engine.hooks import IterationSeedHook, SkippedSamplesHook
from pallava.engine.optim import GroupedAdamW, tag_parameters
from pallava.engine.runtime import adapt_config, prepare_host
from pallava.skipping import SkipLog

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")

PUBLISHED = """
from torch.optim import AdamW
from mmengine.optim import AmpOptimWrapper
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=2e-4, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    accumulative_counts=4,
    loss_scale="dynamic",
    dtype="float16",
    paramwise_cfg=dict(custom_keys=dict(projector=dict(lr_mult=0.5))),
)
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend="nccl"))
"""


def published(tmp_path: Path, text: str = PUBLISHED) -> Config:
    (tmp_path / "published.py").write_text(text)
    return Config.fromfile(tmp_path / "published.py")


@without_cuda
def test_a_config_for_cuda_trains_on_cpu(tmp_path: Path) -> None:
    cfg = adapt_config(published(tmp_path))
    wrapper = cfg.optim_wrapper
    assert wrapper.type in ("OptimWrapper", OptimWrapper)
    assert not {"dtype", "loss_scale"} & set(wrapper)
    assert wrapper.accumulative_counts == 4
    assert cfg.env_cfg.dist_cfg.backend == "gloo"
    assert cfg.model_wrapper_cfg.type == "MMDistributedDataParallel"
    assert cfg.model_wrapper_cfg.device_ids is None


def test_learning_rates_of_parts_move_into_the_optimizer(tmp_path: Path) -> None:
    wrapper = adapt_config(published(tmp_path)).optim_wrapper
    assert "paramwise_cfg" not in wrapper
    model = nn.ModuleDict({"llm": nn.Linear(2, 2), "projector": nn.Linear(2, 2)})
    tag_parameters(model, ["llm", "projector"])
    optimizer = OPTIMIZERS.build({**wrapper.optimizer, "params": model.parameters()})
    assert isinstance(optimizer, GroupedAdamW)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-4, 2e-4]


@pytest.mark.parametrize("rule", ["dict(lr_mult=0.5, decay_mult=0.0)", "dict(decay_mult=0.0)"])
def test_rules_that_the_optimizer_does_not_know_stay(tmp_path: Path, rule: str) -> None:
    text = PUBLISHED.replace("dict(lr_mult=0.5)", rule)
    wrapper = adapt_config(published(tmp_path, text)).optim_wrapper
    assert wrapper.paramwise_cfg.custom_keys.projector
    assert wrapper.optimizer.type is AdamW


def test_a_config_without_training_is_left_alone() -> None:
    cfg = adapt_config(Config({"model": {"type": "x"}}))
    assert cfg.to_dict() == {"model": {"type": "x"}}


@pytest.mark.parametrize("bf16", [True, False])
def test_on_cuda_the_precision_is_what_the_device_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    prepare_host()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    text = PUBLISHED.replace('    loss_scale="dynamic",\n', "").replace("float16", "bfloat16")
    cfg = adapt_config(published(tmp_path, text))
    assert cfg.env_cfg.dist_cfg.backend == "nccl"
    assert cfg.optim_wrapper.type is AmpOptimWrapper
    precision = {k: v for k, v in cfg.optim_wrapper.items() if k in ("dtype", "loss_scale")}
    half = {"dtype": "float16", "loss_scale": "dynamic"}
    assert precision == ({"dtype": "bfloat16"} if bf16 else half)


def test_optimizers_that_deepspeed_removed_say_so() -> None:
    pytest.importorskip("deepspeed")
    prepare_host()
    module = sys.modules.get("deepspeed.runtime.fp16.onebit")
    if module is None:
        pytest.skip("this DeepSpeed still has them")
    with pytest.raises(ValueError, match="OnebitAdam: this DeepSpeed version no longer has it"):
        module.OnebitAdam()


def test_deepspeed_alone_gets_a_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # remembered, to be restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["train", "config.py", "--deepspeed", "deepspeed_zero2"])
    for done in ("_open_gloo_group", "_provide_onebit"):
        monkeypatch.setattr(runtime, done, lambda: None)
    prepare_host.__wrapped__()
    assert [os.environ.get(name) for name in names[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


def test_a_process_closes_its_group_before_it_ends() -> None:
    run = (
        "import atexit, torch.distributed as dist\n"
        "atexit.register(lambda: print('open' if dist.is_initialized() else 'closed'))\n"
        "from pallava.engine.runtime import prepare_host\n"
        "prepare_host()\n"
        "assert dist.is_initialized()\n"
    )
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", run],
        env={**os.environ, **launched, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (ended.stdout.split()[-1:], ended.returncode) == (["closed"], 0), ended.stderr


def test_an_iteration_draws_the_same_after_a_resume() -> None:
    def draw(iteration: int, seed: int = 5) -> tuple[float, float, float]:
        run = SimpleNamespace(seed=seed, iter=iteration)
        IterationSeedHook().before_train_iter(run, batch_idx=0)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    through = [draw(iteration) for iteration in range(4)]
    assert [draw(2), draw(3)] == through[2:]
    assert len(set(through)) == 4
    assert draw(0, seed=6) != through[0]
    draw(2**40)  # beyond what NumPy takes as a seed


def test_what_was_left_out_is_said_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SkipLog(tmp_path / "skipped.jsonl")
    monkeypatch.setattr("pallava.engine.skipping.default_skip_log", lambda: log)
    warnings: list[str] = []
    run = SimpleNamespace(logger=SimpleNamespace(warning=warnings.append))
    SkippedSamplesHook().after_train(run)
    assert warnings == []
    log.record("7", "a.png", "truncated")
    log.record("8", "b.png", "absent")
    SkippedSamplesHook().after_train(run)
    (warning,) = warnings
    assert "2 sample(s) were skipped, for instance a.png: truncated" in warning
    assert str(log.path) in warning
