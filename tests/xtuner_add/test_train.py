"""`xtuner-add train` with real processes and a model of one layer, so that start-up dominates."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm_python import run_module

pytestmark = pytest.mark.slow

PARTS = """
import os, time
import torch
from mmengine.model import BaseModel
from pallava.engine.skipping import default_skip_log


class Points(torch.utils.data.Dataset):
    def __init__(self):
        for number in range(int(os.environ.get("BROKEN_SAMPLES", 0))):
            default_skip_log().record(f"slide_{number}", f"{number}.png", "truncated")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((2,), float(index))


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, data, data_samples=None, mode="loss"):
        if os.environ.get("FAIL_RANK") == os.environ.get("RANK", "0"):
            raise SystemExit(9)
        if "STARTED" in os.environ:
            with open(os.environ["STARTED"], "w") as file:
                file.write(str(os.getpid()))
            time.sleep(120)
        self.calls = getattr(self, "calls", 0) + 1
        if os.environ.get("NAN_AT") == str(self.calls):
            data = data * float("nan")
        if os.environ.get("SPOIL_AT") == str(self.calls):
            self.layer.bias.register_hook(lambda gradient: gradient * float("inf"))
        return {"loss": self.layer(data).square().mean()}
"""

# As published configs are: written for CUDA, mixed precision and NCCL, nothing chosen for CPU.
CONFIG = """
from mmengine.dataset import DefaultSampler
from mmengine.optim import AmpOptimWrapper
from torch.optim import SGD
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.runner import TrainLoop

import line_parts

model = dict(type=line_parts.Line)
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type=line_parts.Points),
    sampler=dict(type=DefaultSampler, shuffle=False),
)
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=SGD, lr=0.01), loss_scale="dynamic", dtype="float16"
)
train_cfg = dict(type=TrainLoop, max_iters=4)
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4))
env_cfg = dict(dist_cfg=dict(backend="nccl"))
visualizer = None
log_processor = dict(by_epoch=False)
"""


class Workplace:
    """A folder with a config and the parts it names, and a way to train there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "line_parts.py").write_text(PARTS)
        (folder / "line.py").write_text(CONFIG)

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "xtuner_add.cli", "train", "line.py", *arguments],
            cwd=self.folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, *arguments: str, **environ: str) -> tuple[int, str]:
        process = self.start(*arguments, **environ)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def train_warm(self, *arguments: str, **environ: str) -> tuple[int, str]:
        """Trains without starting an interpreter; see `tests.warm_python`."""
        done = run_module(
            "xtuner_add.cli",
            ["train", "line.py", *arguments],
            cwd=self.folder,
            environ={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ},
        )
        return done.returncode, done.stdout


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_config_written_for_gpus_trains_on_this_machine(workplace: Workplace) -> None:
    code, output = workplace.train("--work-dir", "out", "--cfg-options", "train_cfg.max_iters=2")
    assert code == 0, output
    assert (workplace.folder / "out" / "iter_2.pth").is_file()  # the command line has the last word
    assert "skipped" not in output


def test_skipped_samples_show_in_the_exit_code(workplace: Workplace) -> None:
    code, output = workplace.train_warm(BROKEN_SAMPLES="2")
    assert code == 3, output
    assert (workplace.folder / "work_dirs" / "line" / "iter_4.pth").is_file()
    (log,) = workplace.folder.glob("work_dirs/line/*/skipped_samples.jsonl")
    assert f"Training finished, but 2 samples were skipped: see {log}" in output


@pytest.mark.parametrize("how", ["NAN_AT", "SPOIL_AT"])
def test_a_run_that_diverges_fails_and_leaves_no_checkpoint(workplace: Workplace, how: str) -> None:
    # SPOIL_AT: the loss of the last step is finite, the step itself ruins the weights.
    number = "3" if how == "NAN_AT" else "4"
    code, output = workplace.train_warm("--work-dir", "out", **{how: number})
    assert code == 1, output
    line = next(line for line in output.splitlines() if line.startswith("Error: "))
    assert f"training diverged at iteration {number}" in line and "optimizer.lr" in line
    assert "Traceback" not in output
    assert not list((workplace.folder / "out").glob("*.pth"))


@pytest.mark.multiproc
def test_two_processes_train_and_count_a_skipped_sample_once(workplace: Workplace) -> None:
    code, output = workplace.train(NPROC_PER_NODE="2", BROKEN_SAMPLES="1")
    assert code == 3, output
    assert " x 2 process(es) x " in output
    assert "but 1 sample was skipped" in output
    assert (workplace.folder / "work_dirs" / "line" / "iter_4.pth").is_file()


@pytest.mark.multiproc
def test_failure_of_one_process_of_two_is_a_failure(workplace: Workplace) -> None:
    code, output = workplace.train(NPROC_PER_NODE="2", FAIL_RANK="1")
    assert code not in (0, 3), output


def test_exit_code_of_a_failed_training_is_kept(workplace: Workplace) -> None:
    code, output = workplace.train_warm(FAIL_RANK="0")
    assert code == 9, output


@pytest.mark.multiproc
def test_interrupt_ends_every_process(workplace: Workplace) -> None:
    started = workplace.folder / "started"
    process = workplace.start(NPROC_PER_NODE="2", STARTED=str(started))
    deadline = time.monotonic() + 240
    while not (started.is_file() and started.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    trainer = int(started.read_text())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode not in (0, 3)
    with pytest.raises(ProcessLookupError):
        os.kill(trainer, 0)
