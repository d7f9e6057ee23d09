"""Training, resuming and testing as users type them, in the hosts' own processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.cite.mm.gastric import make_gastric
from tests.warm_python import run_module

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs" / "cite" / "gastric"
TINY_BERT = ROOT / "tests" / "golden" / "cite" / "tiny_bert"
CITE = CONFIGS / "cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric_tiny.py"
OPTIONS = (
    *("model.head.text_encoder.type=bert", f"model.head.text_encoder.model={TINY_BERT}"),
    *("model.neck.out_features=32", "train_cfg.max_iters=12", "train_cfg.val_interval=12"),
    *("default_hooks.checkpoint.interval=6",),
)
HOSTS = {
    "mmcls": (),
    "mmpretrain": ("default_scope=mmpretrain", "visualizer.type=UniversalVisualizer"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_gastric(folder)
    return folder


ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def mim(folder: Path, verb: str, host: str, *arguments: str | Path) -> str:
    command = (Path(sys.executable).parent / "mim", verb, host, CITE, *arguments)
    words = [*map(str, command), "--cfg-options", *OPTIONS, *HOSTS[host]]
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=ENVIRON)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def script(
    folder: Path,
    verb: str,
    host: str,
    *arguments: str | Path,
    ranks: int | None = None,
    options: tuple = (),
    fails: bool = False,
) -> str:
    """Runs the script that mim starts; mim's own launcher passes rc6 what it does not know."""
    spec = find_spec(host)
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / ".mim" / "tools" / f"{verb}.py"
    launcher = () if ranks is None else ("--launcher", "pytorch")
    words = (CITE, *arguments, *launcher, "--cfg-options", *OPTIONS, *HOSTS[host], *options)
    words = [str(word) for word in words]
    done = run_module(str(file), words, cwd=folder, environ=ENVIRON, ranks=ranks)
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def assert_equal_weights(first: Path, second: Path, tolerance: float = 0.0) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=tolerance, atol=tolerance)


def score(log: str) -> dict[str, float]:
    line = [line for line in log.splitlines() if "bag_accuracy:" in line][-1]
    return {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)", line)}


def trained(folder: Path, host: str) -> tuple[Path, str]:
    """The work folder and the log of a run, trained by the first test that asks."""
    log = folder / f"{host}.log"
    if not log.is_file():
        log.write_text(mim(folder, "train", host, "--work-dir", host))
    return folder / host, log.read_text()


@pytest.mark.parametrize("host", HOSTS)
def test_train_resume_and_test(host: str, folder: Path) -> None:
    work_dir, log = trained(folder, host)
    assert (work_dir / "last_checkpoint").read_text() == "iter_12.pth"

    # What a run looks like that was killed behind its first checkpoint, and moved.
    moved = folder / f"{host}_moved"
    moved.mkdir()
    shutil.copyfile(work_dir / "iter_6.pth", moved / "iter_6.pth")
    (moved / "last_checkpoint").write_text("iter_6.pth")
    resumed = script(folder, "train", host, "--work-dir", moved.name, "--resume")
    assert "resumed epoch: 0, iter: 6" in resumed
    assert "Data continues at iteration 6" in resumed
    assert_equal_weights(work_dir / "iter_12.pth", moved / "iter_12.pth")

    (moved / "last_checkpoint").write_text("iter_6.pth")
    arguments = ("train", host, "--work-dir", moved.name, "--resume")
    options = ("train_dataloader.batch_size=4",)
    refused = script(folder, *arguments, options=options, fails=True)
    assert "the run had 8 patches an iteration, this one has 4" in refused

    tested = mim(
        folder, "test", host, "--checkpoint", work_dir / "iter_12.pth", "--work-dir", f"{host}_test"
    )
    found, before = score(tested), score(log)
    assert {name: found[name] for name in before if "time" not in name} == {
        name: value for name, value in before.items() if "time" not in name
    }
    assert found["bag_auroc_low"] <= found["bag_auroc"] <= found["bag_auroc_high"]
    pictures = [path.name for path in (folder / f"{host}_test").rglob("*.png")]
    kinds = ("confusion_matrix", "reliability")
    assert sorted(pictures) == [f"{k}_{n}_0.png" for k in kinds for n in ("patches", "slides")]


def test_both_hosts_train_the_same_weights(folder: Path) -> None:
    first, second = (trained(folder, host)[0] / "iter_12.pth" for host in HOSTS)
    assert_equal_weights(first, second)


@pytest.mark.multiproc
@pytest.mark.parametrize("host", HOSTS)
def test_two_processes_train_what_one_does(host: str, folder: Path) -> None:
    """The same global batches: 2 x 4 patches instead of 8."""
    single, log = trained(folder, host)
    options = ("train_dataloader.batch_size=4",)
    two = folder / f"{host}_two"
    script(folder, "train", host, "--work-dir", two.name, ranks=2, options=options)
    # The order of sums differs, nothing else.
    assert_equal_weights(single / "iter_12.pth", two / "iter_12.pth", 2e-4)

    resumed = folder / f"{host}_two_resumed"
    resumed.mkdir()
    shutil.copyfile(two / "iter_6.pth", resumed / "iter_6.pth")
    (resumed / "last_checkpoint").write_text("iter_6.pth")
    script(folder, "train", host, "--work-dir", resumed.name, "--resume", ranks=2, options=options)
    assert_equal_weights(two / "iter_12.pth", resumed / "iter_12.pth")

    test = ("--work-dir", f"{host}_two_test")
    both = script(folder, "test", host, single / "iter_12.pth", *test, ranks=2)
    for name, value in score(log).items():
        if "time" not in name:
            assert score(both)[name] == value, name
