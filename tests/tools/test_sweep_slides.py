"""`xtuner-add cite-sweep` on a synthetic PatchGastric folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cite.mm.sweep import SweepPlan, read_scores
from pathcore.files import folder_lock
from tests.cite.mm.gastric import make_gastric
from tests.warm_python import run_module
from xtuner_add.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "cite" / "gastric"
LINEAR = CONFIGS / "linear_clip-vit-b16_1xb128-1k_gastric_tiny.py"
VPT = CONFIGS / "vpt_clip-vit-b16_1xb128-1k_gastric_tiny.py"

KILLED = """
_base_ = {base!r}
import multiprocessing, os, signal

if multiprocessing.parent_process():
    os.kill(os.getpid(), signal.SIGKILL)
"""

pytestmark = pytest.mark.slow


ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a sweep in a warm process; its output contains both streams."""
    return run_module("xtuner_add.cli", ["cite-sweep", *arguments], cwd=folder, environ=ENVIRON)


def test_sweep_is_resumed_and_tells_of_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_gastric(tmp_path)
    arguments = (
        *(f"linear={LINEAR}", f"vpt={VPT}", "--compare", "vpt"),
        *("--train-file", str(data / "gastric_cls3_ann" / "train_all_0.2.txt")),
        *("--num-slides", "2", "--seeds", "2", "--metric", "bag_accuracy"),
        *("--cfg-options", "train_cfg.max_iters=2", "--work-dir", "sweep"),
    )
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stdout[-3000:]
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert table in result.stdout
    assert table.startswith("| method | 2 slides |")
    assert "| vpt minus linear |" in table
    with Image.open(tmp_path / "sweep" / "curve.png") as curve:
        assert curve.width > 400
    slides = (tmp_path / "sweep" / "vpt" / "slides2_seed1" / "train.txt").read_text()
    assert len({line.split("_")[0] for line in slides.splitlines()}) == 6

    files = sorted((tmp_path / "sweep").glob("*/*/scores.json"))
    assert len(files) == 4
    times = {file: file.stat().st_mtime_ns for file in files}
    files[3].unlink()
    name = (data / "gastric_cls3_ann" / "val_0.8.txt").read_text().split()[0]
    image = data / "patches_captions" / name
    content = image.read_bytes()
    image.write_bytes(b"damaged")
    failed = run(tmp_path, *arguments)
    assert failed.returncode == 1
    assert "1 cells failed" in failed.stdout
    assert image.name in failed.stdout + (files[3].parent / "error.txt").read_text()

    image.write_bytes(content)
    again = run(tmp_path, *arguments)
    assert again.returncode == 0, again.stdout[-3000:]
    assert (tmp_path / "sweep" / "table.md").read_text() == table
    assert {f: f.stat().st_mtime_ns for f in files if f != files[3]} == {
        f: time for f, time in times.items() if f != files[3]
    }

    # With other training patches, no score is one of this sweep.
    train = data / "gastric_cls3_ann" / "train_all_0.2.txt"
    plan = SweepPlan(
        configs={"linear": str(LINEAR), "vpt": str(VPT)},
        train_file=str(train),
        num_slides=[2],
        seeds=range(2),
        work_dir="sweep",
        options={"train_cfg.max_iters": 2},
    )
    monkeypatch.chdir(tmp_path)
    assert all(read_scores(plan, cell) for cell in plan.cells())
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:-1]))
    assert not any(read_scores(plan, cell) for cell in plan.cells())


def test_a_killed_cell_fails_alone(tmp_path: Path) -> None:
    data = make_gastric(tmp_path)
    killed = tmp_path / "killed.py"
    killed.write_text(KILLED.format(base=str(LINEAR)))
    command = [
        *(sys.executable, "-m", "xtuner_add.cli", "cite-sweep"),
        *(f"killed={killed}", f"linear={LINEAR}", "--metric", "bag_accuracy"),
        *("--train-file", str(data / "gastric_cls3_ann" / "train_all_0.2.txt")),
        *("--num-slides", "2", "--seeds", "1", "--cfg-options", "train_cfg.max_iters=1"),
        *("--work-dir", "sweep"),
    ]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRON, capture_output=True, text=True)
    assert result.returncode == 1
    assert "1 cells failed" in result.stderr
    assert "killed by SIGKILL" in result.stderr
    (scores,) = tmp_path.glob("sweep/*/*/scores.json")
    assert scores.parent.parent.name == "linear"


def test_few_shot_baselines_run_in_one_sweep(tmp_path: Path) -> None:
    data = make_gastric(tmp_path)
    names = {
        "tip-adapter": "tip-adapter_clip-vit-b16_gastric_tiny",
        "tip-adapter-f": "tip-adapter-f_clip-vit-b16_1xb128-1k_gastric_tiny",
        "clip-adapter": "clip-adapter_clip-vit-b16_1xb128-1k_gastric_tiny",
        "coop": "coop_clip-vit-b16_1xb128-1k_gastric_tiny",
    }
    result = run(
        tmp_path,
        *(f"{name}={CONFIGS / config}.py" for name, config in names.items()),
        *("--train-file", str(data / "gastric_cls3_ann" / "train_all_0.2.txt")),
        *("--num-slides", "2", "--seeds", "1", "--metric", "accuracy", "--work-dir", "sweep"),
        *(
            "--cfg-options",
            "train_cfg.max_iters=2",
            "--cfg-options",
            "test_evaluator.picture=False",
        ),
        *("--cfg-options", "test_evaluator.num_resamples=0"),
    )
    assert result.returncode == 0, result.stdout[-3000:]
    lines = (tmp_path / "sweep/table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(names)
    folder = tmp_path / "sweep/tip-adapter/slides2_seed0"
    cache = torch.load(folder / "iter_0.pth", weights_only=True)["state_dict"]
    patches = (folder / "train.txt").read_text().splitlines()
    assert cache["head.cache.labels"].tolist() == [int(line.split()[-1]) for line in patches]
    tuned = torch.load(
        tmp_path / "sweep/tip-adapter-f/slides2_seed0/iter_2.pth", weights_only=True
    )["state_dict"]
    assert tuned["head.cache.keys"].shape == cache["head.cache.keys"].shape
    assert not torch.equal(tuned["head.cache.keys"], cache["head.cache.keys"])


def test_two_sweeps_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    data = make_gastric(tmp_path)
    train = str(data / "gastric_cls3_ann" / "train_all_0.2.txt")
    (tmp_path / "sweep").mkdir()
    with folder_lock(tmp_path / "sweep" / ".lock"):
        result = run(tmp_path, f"linear={LINEAR}", "--train-file", train, "--work-dir", "sweep")
    assert result.returncode == 1
    assert "another process is working on this folder" in result.stdout
    assert not list(tmp_path.glob("sweep/linear"))


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    for arguments, message in (
        ((str(LINEAR),), "expected NAME=CONFIG"),
        (("a=nowhere.py",), "a: nowhere.py: no such config"),
        ((f"a={LINEAR}",), "expected either --train-file or --train-files"),
        ((f"a={LINEAR}", "--compare", "b"), "--compare b: expected one of a"),
    ):
        result = CliRunner().invoke(main, ["cite-sweep", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr
    arguments = ("cite-sweep", f"a={LINEAR}", "--train-files", "train_4.txt")
    result = CliRunner().invoke(main, [*arguments, "--work-dir", str(tmp_path / "sweep")])
    assert result.exit_code == 1 and "expected one {} for the number of slides" in result.stderr
    assert not (tmp_path / "sweep").exists()
