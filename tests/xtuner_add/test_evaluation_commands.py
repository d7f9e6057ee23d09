"""The evaluation commands as a user types them, killed and resumed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.pallava import goldens
from tests.pallava.engine.tiny_run import run as run_program
from tests.pallava.evaluation.tiny_benchmark import make_data
from tests.pallava.tiny_folders import make_folders
from xtuner_add import cli

REPORT = ("pathvqa_result.json", "metrics.json", "metrics.md", "details.jsonl")
MODEL = ("llama", "--llava", "llava", "--visual-encoder", "plip", "--device", "cpu",
         "--max-new-tokens", "5", "--batch-size", "3")  # fmt: skip
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folders(tmp_path_factory.mktemp("evaluation"))
    make_data(root / "data")
    return root


def invoke(folder: Path, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def report(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in REPORT}


def pathvqa(work_dir: object) -> list[str]:
    return ["evaluate", "pathvqa", *MODEL, "--data", "data/test.json", "--work-dir", str(work_dir)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """The report of a run that nothing disturbed."""
    result = run_program(folder, *pathvqa("whole"))
    assert result.returncode == 0, result.stdout
    assert "# pathvqa" in result.stdout
    return report(folder / "whole")


def test_pathvqa_asks_as_the_originals_command_line(
    folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = pathvqa("compat")
    result = invoke(
        folder, *arguments, "--prompt-template", "llama3_chat", "--compat", "original",
        "--launcher", "none", "--seed", 0, monkeypatch=monkeypatch,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads((folder / "compat" / "metrics.json").read_text())
    assert metrics["settings"]["bos"] == "double"
    assert (folder / "compat" / "pathvqa_result.json").read_bytes() != whole[REPORT[0]]
    arguments = json.loads((folder / "compat" / "run.json").read_text())["arguments"]
    assert arguments["compat"] == "original"


@pytest.mark.multiproc
@pytest.mark.slow
def test_two_processes_give_the_report_of_one(folder: Path, whole: dict[str, bytes]) -> None:
    result = run_program(folder, *pathvqa("two"), "--audit", processes=2)
    assert result.returncode == 0, result.stdout
    assert report(folder / "two") == whole
    assert result.stdout.count("# Audit of pathvqa") == 1
    audits = json.loads((folder / "two" / "audit.json").read_text())
    assert audits["missing"] == {}
    written = sorted(path.name for path in (folder / "two" / "answers").iterdir())
    assert written == ["rank000.jsonl", "rank001.jsonl"]
    # What two processes answered, one needs not ask.
    result = run_program(folder, *pathvqa("two"))
    assert report(folder / "two") == whole
    assert "11/11" in result.stdout


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_report(
    folder: Path, whole: dict[str, bytes]
) -> None:
    """SIGKILL at every change on disk, half-way through it, and at two dozen random times."""
    arguments = pathvqa("")[:-2]
    result = subprocess.run(
        [sys.executable, str(HERE / "evaluation_target.py"), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}
    killed = [row["killed"] for row in rows if "killed" in row]
    assert killed == [-signal.SIGKILL] * (len(killed) - 1) + [0]
    assert len(killed) > 20
    at_random = [row["random"] for row in rows if "random" in row]
    assert set(at_random) <= {0, -signal.SIGKILL}
    assert len(at_random) == 24
    for row in rows:
        if "end" in row:
            assert row["again"] == 0
            assert row["end"] == expected  # and no half-written file beside them
        left = {name: digest for name, digest in row.get("left", {}).items() if name in expected}
        assert left.items() <= expected.items()  # whole or absent


def test_a_skipped_question_ends_with_exit_code_3(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "images" / "strip_8.png").write_bytes(b"no image")
    result = invoke(
        folder, "evaluate", "pathvqa", *MODEL, "--data", data, "--work-dir", tmp_path / "run",
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert result.exit_code == 3, result.output
    assert "3 questions were skipped" in result.output


def test_pmcvqa_reads_the_published_csv(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "test.csv"
    row = {"Figure_path": "sq_big.png", "Question": "What?", "Answer": "fat", "Choice A": " A: fat",
           "Choice B": " B: liver", "Choice C": " C: bone", "Choice D": " D: skin",
           "Answer_label": "A"}  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)
    result = invoke(
        folder, "evaluate", "pmc-vqa", *MODEL, "--data-path", path, "--image-folder", "data/images",
        "--work-dir", tmp_path / "run", "--audit", monkeypatch=monkeypatch,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "# Audit of pmc-vqa" in result.output and "audit.html" in result.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "audit.jsonl").open()]
    # One question has no other to exchange images with.
    assert {row["arm"] for row in rows} == {
        "true", "again", "blank", "none", "options_only", "no_options",
        *(f"{name}_{number}" for name in ("reworded", "rotated") for number in (1, 2, 3)),
    }  # fmt: skip
    details = json.loads((tmp_path / "run" / "details.jsonl").read_text())
    assert details["question"].splitlines()[1] == "A: fat"
    assert "letters" in result.output


def test_zero_shot_reads_folders_of_classes(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Normal/1.png", "OSCC/2.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True)
        path.write_bytes((goldens.GOLDEN / "anyres" / "sq_big.png").read_bytes())
    arguments = (
        "evaluate",
        "zero-shot",
        *MODEL,
        "--data-path",
        tmp_path / "images",
        "--work-dir",
        tmp_path / "run",
    )
    result = invoke(folder, *arguments, "--option", "classes=oscc", monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["confusion"]["true"] == [
        "normal oral epithelium",
        "oral squamous cell carcinoma",
    ]
    result = invoke(folder, *arguments, monkeypatch=monkeypatch)
    assert result.exit_code == 1
    assert "classes=NAME" in result.output


def test_evaluate_takes_any_benchmark_by_name(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*MODEL, "--data-path", "data/test.json", "--work-dir", tmp_path / "run")
    result = invoke(folder, "evaluate", "pathvqa", *arguments, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    result = invoke(folder, "evaluate", "pathvq", *arguments, monkeypatch=monkeypatch)
    assert "did you mean pathvqa" in result.output
    result = invoke(
        folder, "evaluate", "pathvqa", *arguments, "--option", "colour=red", monkeypatch=monkeypatch
    )
    assert result.exit_code == 1
    assert "colour" in result.output


def test_answer_asks_about_files_and_folders(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    result = invoke(
        folder, "answer", *MODEL, "data/images", goldens.GOLDEN / "anyres" / "sq_big.png",
        "--question", "What?", "-q", "Is fibrosis shown?", "--output", output,
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 10
    same = [row["answer"] for row in rows if row["image"].endswith("sq_big.png")]
    assert same[:2] == same[2:]
    (tmp_path / "broken.png").write_bytes(b"no image")
    result = invoke(
        folder, "answer", *MODEL, tmp_path / "broken.png", "-q", "What?", monkeypatch=monkeypatch
    )
    assert result.exit_code == 3
    assert "skipped" in result.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("data/images", "is a directory"),
        ("config.py/answers.jsonl", "config.py"),
        ("picture.png", "picture.png: would replace what is read"),
    ],
)
def test_answers_are_asked_for_only_if_they_can_be_written(
    folder: Path, output: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "config.py").touch()
    shutil.copyfile(goldens.GOLDEN / "anyres" / "sq_big.png", folder / "picture.png")
    result = invoke(
        folder, "answer", *MODEL, "picture.png", "-q", "What?", "--output", output,
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert result.exit_code in (1, 2) and message in result.output
    assert "What?" not in result.output  # nothing was asked
    assert (folder / "picture.png").stat().st_size > 1000


def test_wrong_paths_are_errors_a_user_understands(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = pathvqa(tmp_path / "run")
    arguments[arguments.index("data/test.json")] = "data/absent.json"
    result = invoke(folder, *arguments, monkeypatch=monkeypatch)
    assert (result.exit_code, result.output.strip()) == (
        1, "Error: data/absent.json: no such data file"
    )  # fmt: skip
    arguments = pathvqa(tmp_path / "run")
    arguments[arguments.index("llava")] = "data"
    result = invoke(folder, *arguments, monkeypatch=monkeypatch)
    assert "no projector/ in it" in result.output
    monkeypatch.setenv("NPROC_PER_NODE", "two")
    result = invoke(folder, *pathvqa("x"), monkeypatch=monkeypatch)
    assert result.exit_code == 2
    assert "NPROC_PER_NODE" in result.output
