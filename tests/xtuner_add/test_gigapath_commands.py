"""Both commands and both scripts as a user types them, on synthetic data and tiny recipes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

from gigapath.finetune import mil, run
from tests.gigapath.slide_cohort import write_cohort, write_published_split
from tests.pathgen.histology import KINDS, write_class_folders
from tests.pathgen.tiny_encoders import save_open_clip
from tests.xtuner_add.embedding_zip import write_tiles
from xtuner_add.cli import main
from xtuner_add.commands.gigapath import find_recipe, find_task
from xtuner_add.commands.options import yaml_values

ROOT = Path(__file__).parents[2]
SMALL = ("--device", "cpu", "--option", "num_resamples=20")


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Thirty slides of three classes of the PANDA task, with the table and a split."""
    _, table = write_cohort(tmp_path, 30)
    write_published_split(tmp_path / "splits", table)
    return tmp_path


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    return write_tiles(tmp_path)


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def finetune(folder: Path, out: str, *more: Any) -> Result:
    return invoke(
        "finetune-slides", folder / "features", "--labels", folder / "labels.csv", "--recipe",
        "panda_tiny", "--output", folder / out, *SMALL, *more,
    )  # fmt: skip


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Without the processes of whoever runs the tests, our programs first, outputs in a folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OUTPUT": str(folder / "out"), **more}


def test_finetune_with_every_method(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(mil.MODELS["abmil"], settings={**mil.MIL_SETTINGS, "epochs": 10, "lr": 1e-3})
    monkeypatch.setattr(run, "MODELS", {**mil.MODELS, "abmil": short})
    (slides / "features/S001.h5").unlink()
    methods = [
        part
        for name in ("slide_encoder", "abmil", "knn", "logistic")
        for part in ("--method", name)
    ]
    found = finetune(slides, "out", "--splits", slides / "splits", *methods)
    assert found.exit_code == 3, found.output
    assert (
        "1 slide was skipped" in found.output
        and "S001" in (slides / "out/skipped.jsonl").read_text()
    )
    results = json.loads((slides / "out/results.json").read_text())
    assert list(results["methods"]) == ["slide_encoder", "abmil", "knn", "logistic"]
    for method in results["methods"]:
        assert f"| {method} | 0 | 4 |" in found.output
        folder = slides / f"out/{method}/fold_0"
        assert (folder / "predictions_test.csv").is_file()
        assert Image.open(folder / "reliability.png").size == (528, 624)
    abmil = results["methods"]["abmil"]["folds"][0]
    assert abmil["test"]["accuracy"]["value"] > 0.7


def test_finetune_refuses_what_there_is_not(slides: Path) -> None:
    for more, message in (
        (("--recipe", "pando"), "pando: neither a file nor a known name; did you mean panda"),
        (("--task", "pando"), "task pando"),
        (("--recipe", "cohort_tiny"), "has no task"),
        (("--option", "epoch=3"), "did you mean epochs"),
        (("--option", "epochs"), "NAME=VALUE"),
        (("--method", "forest"), "forest"),
        (("--splits", slides), "train_0.csv"),
    ):
        found = finetune(slides, "out", *more)
        expected = 2 if message == "NAME=VALUE" else 1
        assert found.exit_code == expected and message in found.output, (more, found.output)
        assert "Traceback" not in found.output


def test_published_arguments_are_named(slides: Path) -> None:
    for more, message in (
        (("--option", "fp16=true"), "precision=bf16"),
        (("--option", "latent_dim=768"), "follows from model_arch"),
        (("--option", "report_to=tensorboard"), "curves.png"),
        (("--option", "pat_strat=true"), "split_key=pat_id"),
        (("--blr", "0.01"), "write --option blr=VALUE"),
        (("--warmup-epochs", "0.01"), "write --option warmup_epochs=VALUE"),
    ):
        found = finetune(slides, "out", *more)
        assert found.exit_code != 0 and message in found.output, (more, found.output)
        assert "near" not in found.output and "Traceback" not in found.output
    found = invoke("probe-tiles", slides / "features", "--output", slides / "out", "--lr", "0.01")
    assert found.exit_code == 2 and "write --option lr=VALUE" in found.output
    found = invoke("probe-tiles", slides / "features", "--output", slides / "out", "--methid", "x")
    assert found.exit_code == 2 and "--method" in found.output


def test_recipes_tasks_and_options() -> None:
    panda = find_recipe("panda")
    assert find_task(None, panda) == panda.parent / "tasks/panda.yml"
    assert find_task("mutation_5_gene", panda).is_file()
    assert yaml_values(["a-b=3", "c=1e-3", "d=", "e=[1, 2]"]) == {
        "a_b": 3, "c": "1e-3", "d": "", "e": [1, 2],
    }  # fmt: skip


@pytest.mark.multiproc
def test_script_of_panda_in_two_processes_learns_what_one_learns(slides: Path) -> None:
    """The published command; only the size of the encoder is made smaller."""
    same = ("--splits", slides / "splits", "--option", "epochs=2", "--option", "dropout=0.2")
    one = finetune(slides, "one", *same)
    assert one.exit_code == 0, one.output
    two = subprocess.run(
        ["bash", "scripts/run_panda.sh", str(slides / "features"), *SMALL, *map(str, same[2:])],
        cwd=ROOT,
        env=environment(slides, DATASETCSV=str(slides / "labels.csv"), RECIPE="panda_tiny",
                        PRESPLITDIR=str(slides / "splits"), NPROC_PER_NODE="2"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    assert "| slide_encoder | 0 | 5 |" in two.stdout
    results = json.loads((slides / "out/results.json").read_text())
    assert results["task"]["name"] == "panda" and len(results["task"]["classes"]) == 6
    assert results["methods"]["slide_encoder"]["folds"][0]["test"]["undefined"] == ["3", "4", "5"]
    left, right = (
        load_file(slides / name / "slide_encoder/fold_0/model.safetensors")
        for name in ("one", "out")
    )
    for key, value in left.items():
        if not key.endswith("k_proj.bias"):  # softmax takes no notice: its gradient is rounding
            torch.testing.assert_close(value, right[key], atol=1e-5, rtol=1e-3)
    history = [
        json.loads((slides / name / "slide_encoder/fold_0/history.json").read_text())
        for name in ("one", "out")
    ]
    for single, double in zip(*history, strict=True):
        assert single["train_loss"] == pytest.approx(double["train_loss"], abs=1e-5)
        assert single["val_loss"] == pytest.approx(double["val_loss"], abs=1e-5)


def test_probe(tiles: Path) -> None:
    with zipfile.ZipFile(tiles / "tiles.zip", "a") as archive:
        archive.writestr("pcam/train/broken.pt", b"nothing")
    with (tiles / "tiles.csv").open("a") as file:
        file.write("broken,0,train\n")
    arguments = ("probe-tiles", tiles / "tiles.zip", "--labels", tiles / "tiles.csv", "--recipe",
                 "pcam_tiny", "--method", "linear_probe", "--method", "knn", *SMALL)  # fmt: skip
    found = invoke(*arguments, "--output", tiles / "out")
    assert found.exit_code == 3, found.output
    assert "| linear_probe | 20 |" in found.output and "| knn | 20 |" in found.output
    assert "broken" in (tiles / "out/skipped.jsonl").read_text()
    rows = list(csv.DictReader((tiles / "out/linear_probe/predictions_test.csv").open()))
    assert sum(row["true"] == row["predicted"] for row in rows) > 16
    found = invoke(*arguments, "--output", tiles / "out", "--option", "lr=0.5")
    assert found.exit_code == 1 and "other settings" in found.output


def test_encoder_by_protocols(tmp_path: Path) -> None:
    encoder = save_open_clip(tmp_path / "clip")
    write_class_folders(tmp_path / "train", 8)
    write_class_folders(tmp_path / "test", 5, start=0)
    (tmp_path / "test/fat/9.png").write_bytes(b"no image")
    config = {"name": "kinds", "classes": [{"name": kind} for kind in KINDS]}
    (tmp_path / "kinds.json").write_text(json.dumps(config))
    arguments = ("probe-tiles", tmp_path / "test", "--output", tmp_path / "out", *SMALL,
                 "--encoder", encoder)  # fmt: skip
    chosen = (*arguments, "--image-set", tmp_path / "kinds.json", "--train", tmp_path / "train")
    found = invoke(*chosen, "--protocol", "uni-knn", "--protocol", "uni-few-shot", "--repeats", "5")
    assert found.exit_code == 3, found.output
    assert "| uni-knn | 20 |" in found.output and "| uni-few-shot | 8 | 5 |" in found.output
    assert "16 shots skipped: the smallest class has 8 training cases" in found.output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["methods"]["uni-knn"]["test"]["balanced_accuracy"]["low"] > 0.25
    shots = results["methods"]["uni-few-shot"]["shots"]
    assert shots["8"]["accuracy"]["value"] > 0.5
    assert (tmp_path / "out/uni-knn/reliability.png").is_file()
    for more, code, message in (
        ((*arguments, "--method", "knn"), 2, "either --labels or --image-set"),
        ((*arguments[:4], "--image-set", "bach"), 2, "require --encoder"),
        ((*chosen, "--protocol", "uni-kn"), 2, "did you mean uni-knn"),
        ((*chosen, "--method", "knn", "--repeats", "3"), 2, "--repeats requires --shots"),
        ((*chosen, "--shots", "4"), 1, "k shots are for"),
        ((*arguments, "--image-set", "bahc"), 1, "bahc"),
    ):
        found = invoke(*more)
        assert found.exit_code == code and message in found.output, (more, found.output)
    found = invoke("probe-tiles", "--list")
    assert found.exit_code == 0 and "uni-knn: 20 neighbours" in found.output


def test_script_of_pcam(tiles: Path) -> None:
    """The published command; only the number of steps is made smaller."""
    result = subprocess.run(
        ["bash", "scripts/run_pcam.sh", str(tiles / "tiles.zip"), *SMALL,
         "--option", "train_iters=200"],
        cwd=ROOT, env=environment(tiles, DATASETCSV=str(tiles / "tiles.csv")), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    settings = json.loads((tiles / "out/results.json").read_text())["settings"]
    assert (settings["lr"], settings["weight_decay"], settings["batch_size"]) == (0.02, 0.01, 128)
    assert "| linear_probe | 20 |" in result.stdout
