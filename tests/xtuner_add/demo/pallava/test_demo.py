"""The whole road from the command line, at the size of `--quick`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pathcore.exit_codes import EXIT_OK, EXIT_SKIPPED
from tests.warm_python import run_module
from tests.xtuner_add.demo.pallava.exported_answers import differences
from xtuner_add.cli import main
from xtuner_add.demo import stages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TRAINED = [
    f"{mode}/{step}"
    for mode in ("scale_invariant", "released")
    for step in ("domain_alignment", "instruction_tuning")
]


def demo(work_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xtuner_add.cli", "demo", "--quick", "--seed", "5"]
    return subprocess.run(
        [*command, "--work-dir", str(work_dir)], capture_output=True, text=True, check=False
    )


def run_warm(arguments: Sequence[object], folder: Path, log: Path, title: str, row: int) -> None:
    """Replaces `stages.run_command`, whose nine processes would each import XTuner anew."""
    environ = os.environ | {"OMP_NUM_THREADS": str(stages.threads()), "HF_HUB_OFFLINE": "1"}
    done = run_module("xtuner_add.cli", list(map(str, arguments)), cwd=folder, environ=environ)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        stream.write(done.stdout)
    if done.returncode not in (EXIT_OK, EXIT_SKIPPED):
        raise stages.StageError(f"{title}: exit code {done.returncode}\n{done.stdout[-3000:]}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo; later tests run it again, with real processes."""
    work_dir = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    command = ["demo", "--quick", "--seed", "5", "--work-dir", str(work_dir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xtuner_add.demo.pallava.pipeline.run_command", run_warm)
        result = CliRunner().invoke(main, command)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output[-3000:]
    assert "report.html" in result.output
    return work_dir


def test_summary_states_every_figure(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("closed_accuracy", "majority_accuracy", "shuffled_accuracy", "open_accuracy"):
        assert 0 <= summary[name] <= 1
    assert set(summary["subimage_accuracy"]) == {"scale_invariant", "released"}
    assert summary["majority_accuracy"] == 0.5
    assert summary["seconds"] > 0
    for name, (low, high) in summary["intervals_95"].items():
        if name != "subimage_accuracy":
            assert low <= summary[name] <= high


def test_stages_ran_in_their_modes(finished: Path) -> None:
    from pathcore.weights import read_state_dict

    for folder in TRAINED:
        names = read_state_dict(finished / folder / "iter_20.pth")
        crossed = any(".crossattention." in name for name in names)
        assert crossed == folder.startswith("scale_invariant")


def test_report_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)=["']([^"'#]+)""", page)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "{{" not in page


def test_every_held_out_question_is_answered(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
    asked = (finished / "data" / "held_out.jsonl").read_text().splitlines()
    assert len(rows) == len(asked)
    assert all(isinstance(row["prediction"], str) for row in rows)


@pytest.mark.skipif("PALLAVA_TRANSFORMERS_PYTHONS" not in os.environ, reason="set by make test")
def test_exported_model_answers_as_the_training_code(finished: Path) -> None:
    python = os.environ["PALLAVA_TRANSFORMERS_PYTHONS"].split(os.pathsep)[-1]
    assert differences(finished, python, num_questions=40) == []


def test_rerun_repeats_what_is_lost_and_nothing_else(finished: Path) -> None:
    answers = (finished / "answers.jsonl").read_bytes()
    kept = {name: (finished / name / "iter_20.pth").stat().st_mtime_ns for name in TRAINED}
    (finished / "answers.jsonl").unlink()
    result = demo(finished)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (finished / "answers.jsonl").read_bytes() == answers
    assert {name: (finished / name / "iter_20.pth").stat().st_mtime_ns for name in kept} == kept


def test_stopped_stage_goes_on_from_its_checkpoint(finished: Path) -> None:
    """What a kill leaves behind: a checkpoint, but neither the end mark nor the manifest's word."""
    stopped = finished / TRAINED[1]
    manifest = finished / "manifest.json"
    rows = json.loads(manifest.read_text())
    rows["scale_invariant instruction_tuning"]["done"] = False
    manifest.write_text(json.dumps(rows))
    (stopped / "done").unlink()
    result = demo(finished)
    assert result.returncode == 0, result.stderr[-3000:]
    log = (finished / "logs" / "scale_invariant_instruction_tuning.log").read_text()
    assert "resumed epoch" in log
