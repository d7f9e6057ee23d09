"""Processes of a job take separate GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pathcore.device_claims import Placement, choose_device, claim

ROOT = Path(__file__).parents[2]


@pytest.mark.multiproc
def test_each_worker_takes_a_gpu_of_its_own(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pathcore.device_claims import claim\n"
        "try: print(claim(Path(sys.argv[1]), 2), flush=True)\n"
        "except RuntimeError as error: print(error, flush=True)\n"
        "sys.stdin.read()"
    )
    assert claim(tmp_path, 2) == 0
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipe = subprocess.PIPE
    first = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    assert first.stdout is not None and first.stdout.readline() == "1\n"
    second = subprocess.run(command, input="", capture_output=True, text=True, cwd=ROOT, check=True)
    assert second.stdout == "2 GPUs, all taken by other workers: ask for fewer --workers\n"
    first.kill()
    first.communicate()
    third = subprocess.run(command, input="", capture_output=True, text=True, cwd=ROOT, check=True)
    assert third.stdout == "1\n"  # given back by the one that was killed


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_job_finds_the_gpu_whether_it_is_named_or_not(
    device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    placement = Placement(device).for_job(workers=2, engine="process", progress=False)
    assert (placement.device, placement.own_gpu) == ("cuda", True)
    assert placement.pool == {"gpus_per_task": 1, "can_fork": False}


def test_a_job_without_a_gpu_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placement = Placement().for_job(workers=2, engine="process", progress=False)
    assert (placement.device, placement.own_gpu) == ("cpu", False)
    assert placement.pool == {"gpus_per_task": 0, "can_fork": True}


@pytest.mark.parametrize(
    ("device", "number", "message"),
    [
        ("gpu", 0, "device 'gpu': expected cpu, cuda or cuda:INDEX"),
        ("cuda", 0, "device 'cuda': torch .* finds no GPUs on this machine"),
        ("cuda:0", 0, "device 'cuda:0': torch .* finds no GPUs"),
        ("cuda:3", 2, "device 'cuda:3': torch .* finds 2 GPUs"),
    ],
)
def test_a_device_that_is_not_there(
    device: str, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    with pytest.raises(ValueError, match=message):
        choose_device(device)


def test_a_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("") == choose_device() == torch.device("cuda")
    assert choose_device(torch.device("cpu")) == torch.device("cpu")
