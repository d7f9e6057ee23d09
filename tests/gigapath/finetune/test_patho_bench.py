"""Tasks in Patho-Bench's published layout, with the mess that such tables have."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gigapath.finetune.bags import SlideFolder, stored_vectors
from gigapath.finetune.patho_bench import read_patho_bench
from gigapath.finetune.run import finetune_slides
from gigapath.finetune.settings import FinetuneSettings
from wsi.store import read_features, write_features
from xtuner_add.cli import main

ER = "task_col: er\nsample_col: case_id\nextra_cols: []\nlabel_dict: {0: negative, 1: positive}\n"


def write(folder: Path, config: str, lines: list[str], name: str = "k=all.tsv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return folder


def cases(count: int = 12) -> list[str]:
    """Two slides of each case; ids with leading zeros; labels that pandas made floats."""
    lines = ["case_id\tslide_id\ter\tfold_0\tfold_1"]
    for number in range(count):
        parts = ["test" if number % 3 == fold else "train" for fold in (0, 1)]
        for slide in "ab":
            lines.append("\t".join([f"00{number}", f"00{number}{slide}",
                                    f"{number % 2}.0", *parts]))  # fmt: skip
    return lines


def test_samples_are_cases(tmp_path: Path) -> None:
    lines = [*cases(), "099\t099a\t7\ttrain\ttrain", "098\t../098a\t1\ttrain\ttrain"]
    read = read_patho_bench(write(tmp_path / "bcnb/er", ER, lines))
    assert read.task.name == "bcnb/er" and read.task.setting == "binary"
    assert read.task.classes == ("negative", "positive")
    assert read.slides["003"] == ("003a", "003b") and int(read.labelled.labels["003"]) == 1
    assert list(read.splits) == [0, 1]
    assert read.splits[1].test == ("001", "004", "007", "0010") and read.splits[0].val == ()
    assert "er '7'" in read.labelled.skipped[0]["reason"]
    assert read.labelled.skipped[1]["id"] == "../098a"


def test_samples_are_slides_and_labels_the_other_way_round(tmp_path: Path) -> None:
    config = "task_col: grade\nsample_col: slide_id\nlabel_dict: {low: 0, mid: 1, high: 2}\n"
    lines = ["case_id\tslide_id\tgrade\tfold_0", "A\ta1\t2\ttrain", "A\ta2\t0\ttrain",
             "B\tb1\t1\ttest", "C\tc1\t1\t"]  # fmt: skip
    folder = write(tmp_path / "panda/isup_grade", config, lines, name="k=4.tsv")
    read = read_patho_bench(folder / "k=4.tsv")
    assert read.task.classes == ("low", "mid", "high") and read.task.setting == "multi_class"
    assert int(read.labelled.labels["a1"]) == 2 and read.labelled.patients["a2"] == "A"
    assert read.splits[0].train == ("a1", "a2") and read.splits[0].test == ("b1",)
    with pytest.raises(FileNotFoundError, match="k=all"):
        read_patho_bench(folder)


@pytest.mark.parametrize("sample", ["case_id", "slide_id"])
@pytest.mark.parametrize("row", ["A\ta1.svs\t0\ttest", "B\ta1\t0\ttrain"])
def test_one_slide_under_two_ids_or_patients(tmp_path: Path, sample: str, row: str) -> None:
    config = f"task_col: er\nsample_col: {sample}\nlabel_dict: {{0: negative, 1: positive}}\n"
    lines = ["case_id\tslide_id\ter\tfold_0", "A\ta1\t0\ttrain", "C\tc1\t1\ttest"]
    folder = write(tmp_path / "er", config, [*lines, lines[1]])  # a repeated row is no fault
    assert len(read_patho_bench(folder).labelled.labels) == 2
    with pytest.raises(ValueError, match=r"a1 of A and a1.* of [AB] are one slide|in two parts"):
        read_patho_bench(write(folder, config, [*lines, row]))


def test_survival(tmp_path: Path) -> None:
    config = ("task_col: OS\nsample_col: case_id\nextra_cols: [OS_event, OS_days]\n"
              "label_dict: {0: early, 1: late}\n")  # fmt: skip
    lines = ["case_id\tslide_id\tOS\tOS_event\tOS_days\tfold_0", "A\ta1\t0\t1\t120\ttrain",
             "B\tb1\t1\t0\t800.5\ttest"]  # fmt: skip
    read = read_patho_bench(write(tmp_path / "cptac_ccrcc/OS", config, lines))
    assert read.task.is_survival and read.task.classes == ("risk",)
    assert read.labelled.labels["B"].tolist() == [800.5, 0]


@pytest.mark.parametrize(
    ("config", "lines", "message"),
    [
        (ER, ["case_id\tslide_id\ter\tfold_0", "A\ta\t0\ttrain", "A\tb\t1\ttrain"], "two labels"),
        (ER, ["case_id\tslide_id\ter\tfold_0", "A\ta\t0\ttrain", "A\tb\t0\ttest"], "two parts"),
        (ER, ["case_id\tslide_id\ter\tfold_0", "A\ta\t0\tholdout"], "found 'holdout'"),
        (ER, ["case_id\tslide_id\ter", "A\ta\t0"], "fold_0"),
        (ER, ["case_id,slide_id,er,fold_0", "A,a,0,train"], "no columns"),
        ("sample_col: case_id\n", ["case_id\tslide_id"], "task_col: expected a column"),
        ("task_col: er\nsample_col: case_id\n", ["case_id\tslide_id\ter"], "label_dict"),
    ],
)
def test_bad_tasks(config: str, lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_patho_bench(write(tmp_path / "s/t", config, lines))


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Features of the cases: only one of the two slides of a positive case says so."""
    write(tmp_path / "bcnb/er", ER, cases())
    (tmp_path / "features").mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        for slide in "ab":
            features = generator.normal(0, 0.2, (6, 8)).astype(np.float32)
            features[:, 0] += 3 * (number % 2) * (slide == "b")
            coords = np.array([[256 * n, 0] for n in range(6)])
            path = tmp_path / f"features/00{number}{slide}.h5"
            write_features(path, features, coords, encoder="made-up")
    (tmp_path / "features/002b.h5").unlink()
    (tmp_path / "vectors").mkdir()
    torch.save(torch.tensor([1.0, 2.0]), tmp_path / "vectors/003a.pt")
    torch.save(torch.tensor([2.0, 3.0]), tmp_path / "vectors/003b.pt")
    return tmp_path


def test_bags_hold_all_slides_of_a_case(bench: Path) -> None:
    settings = FinetuneSettings(input_dim=0, num_workers=0, num_resamples=0, model_select="val")
    task = read_patho_bench(bench / "bcnb/er")
    arguments: dict[str, Any] = {"settings": settings, "device": "cpu", "progress": False}
    results = finetune_slides(
        bench / "features", task, None, bench / "out", methods=("logistic",), **arguments
    )
    for fold in results["methods"]["logistic"]["folds"]:
        assert fold["test"]["accuracy"]["value"] > 0.7
    folder = SlideFolder(bench / "features", slides_of=task.slides)
    parts = [read_features(bench / f"features/003{slide}.h5")[0] for slide in "ab"]
    assert np.array_equal(folder.read("003").features.numpy(), np.concatenate(parts))
    means = stored_vectors(bench / "vectors", ["003"], task.slides)[0]["003"]
    assert means.tolist() == [1.5, 2.5]
    rows = list(csv.DictReader((bench / "out/logistic/fold_1/predictions_test.csv").open()))
    assert [row["id"] for row in rows] == ["001", "004", "007", "0010"]
    skipped = [json.loads(line) for line in (bench / "out/skipped.jsonl").open()]
    assert [row["id"] for row in skipped] == ["002"] and "002b" in skipped[0]["reason"]
    assert results["num_without_row"] == 0
    with pytest.raises(ValueError, match="samples of bcnb/er have several slides"):
        finetune_slides(bench / "features", task, None, bench / "encoder", **arguments)


def test_command(bench: Path) -> None:
    def run(*more: Any) -> Any:
        return CliRunner().invoke(
            main,
            ["train-mil", str(bench / "features"), "--output", str(bench / "mil"), "--model",
             "abmil", "--epochs", "8", "--lr", "0.01", "--embed-dim", "8", "--fold", "1",
             "--hidden-dim", "4", "--device", "cpu", "--heat-maps", "--option", "num_workers=0",
             "--option", "num_resamples=0", *map(str, more)],
        )  # fmt: skip

    assert run().exit_code == 2
    assert run("--patho-bench", bench / "bcnb/er", "--splits", bench).exit_code == 2
    found = run("--patho-bench", bench / "bcnb/er")
    assert found.exit_code == 3, found.output
    assert "| abmil | 1 | 0 | 4 | 1.000" in found.output
    pictures = sorted(p.name for p in (bench / "mil/abmil/fold_1_seed_0/attention").iterdir())
    assert len(pictures) == 8 and pictures[:2] == ["0010a.png", "0010b.png"]
