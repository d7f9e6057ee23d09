from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pallava.skipping import SkipLog
from pathcore.exit_codes import EXIT_FAILED, EXIT_SKIPPED, EXIT_USAGE
from xtuner_add import launch
from xtuner_add.launch import Processes, build_command, child_environ, run_child
from xtuner_add.modes import MODES
from xtuner_add.run_mode import _errors_in_one_line

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_one_process_runs_in_this_interpreter() -> None:
    command = build_command(MODES["train"], ["a.py", "--seed", "1024"], {})
    assert command == [
        sys.executable, "-m", "xtuner_add.run_mode", "train", "a.py", "--seed", "1024",
    ]  # fmt: skip


def test_the_published_command_for_sixteen_gpus_becomes_a_torchrun_of_sixteen() -> None:
    environ = {
        "NPROC_PER_NODE": "8", "NNODES": "2", "PORT": "12345", "ADDR": "10.0.0.7", "NODE_RANK": "1",
    }  # fmt: skip
    arguments = ["a.py", "--deepspeed", "deepspeed_zero2", "--seed", "1024"]
    assert build_command(MODES["train"], arguments, environ) == [
        *TORCHRUN,
        "--nnodes=2",
        "--node_rank=1",
        "--nproc_per_node=8",
        "--master_addr=10.0.0.7",
        "--master_port=12345",
        "-m",
        "xtuner_add.run_mode",
        "train",
        *arguments,
        "--launcher",
        "pytorch",
    ]


def test_one_machine_takes_a_free_port_and_empty_variables_count_as_unset() -> None:
    environ = {"NPROC_PER_NODE": "2", "NNODES": "", "PORT": "", "ADDR": "", "NODE_RANK": ""}
    command = build_command(MODES["train"], ["a.py"], environ)
    assert "--nproc_per_node=2" in command
    assert "--master_addr=127.0.0.1" in command
    (port,) = [part.split("=")[1] for part in command if part.startswith("--master_port=")]
    assert 1024 < int(port) < 65536


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [
        ({"NPROC_PER_NODE": "4"}, ["a.py", "--launcher", "slurm"]),
        ({"NPROC_PER_NODE": "4"}, ["a.py", "--launcher=slurm"]),
        ({"NPROC_PER_NODE": "4", "RANK": "2"}, ["a.py", "--launcher", "pytorch"]),
    ],
)
def test_processes_that_others_started_start_no_more(
    environ: dict[str, str], arguments: list[str]
) -> None:
    command = build_command(MODES["train"], arguments, environ)
    assert command == [sys.executable, "-m", "xtuner_add.run_mode", "train", *arguments]


def test_launcher_named_by_the_user_is_not_named_twice_and_works_with_one_process() -> None:
    command = build_command(MODES["train"], ["a.py", "--launcher", "pytorch"], {})
    assert command[:3] == TORCHRUN
    assert command.count("--launcher") == 1


def test_several_processes_always_have_a_launcher() -> None:
    command = build_command(MODES["train"], ["a.py", "--launcher", "none"], {"NPROC_PER_NODE": "2"})
    assert command[-2:] == ["--launcher", "pytorch"]  # of two, XTuner takes the last


def test_modes_of_one_process_ignore_the_number_of_processes() -> None:
    command = build_command(MODES["convert merge"], ["a", "b", "c"], {"NPROC_PER_NODE": "8"})
    assert command[1:] == ["-m", "xtuner_add.run_mode", "convert merge", "a", "b", "c"]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, r"NPROC_PER_NODE='two' must be a whole number of at least 1"),
        ({"NPROC_PER_NODE": "0"}, r"NPROC_PER_NODE='0'"),
        ({"NNODES": "2"}, r"NNODES=2 needs NODE_RANK and ADDR and PORT too"),
        ({"NNODES": "2", "NODE_RANK": "0", "PORT": "1"}, r"needs ADDR too"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "PORT": "1", "ADDR": "a"},
            r"NODE_RANK=2 must be below NNODES=2",
        ),
        ({"NNODES": "2", "NODE_RANK": "-1", "PORT": "1", "ADDR": "a"}, r"NODE_RANK='-1'"),
        ({"PORT": "http"}, r"PORT='http'"),
    ],
)
def test_impossible_processes_are_an_error_that_names_the_variable(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Processes.from_environ(environ)


def test_programs_of_this_environment_come_first_on_the_path() -> None:
    programs = str(Path(sys.executable).parent)
    changed = child_environ({"PATH": "/usr/bin", "HOME": "/root"})
    assert changed == {"PATH": f"{programs}:/usr/bin", "HOME": "/root"}
    assert child_environ(changed) == changed
    assert child_environ({})["PATH"] == programs


@pytest.mark.parametrize("code", [0, 1, 3, 7])
def test_exit_code_of_the_child_is_kept(code: int) -> None:
    assert run_child([sys.executable, "-c", f"raise SystemExit({code})"], os.environ) == code


def test_child_ended_by_a_signal_gives_the_code_of_a_shell() -> None:
    child = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_child([sys.executable, "-c", child], os.environ) == 128 + signal.SIGKILL


def _wait_for(path: Path, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear within {seconds} s")


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


CHILD = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    with (folder / "signals").open("a") as log:
        log.write(f"{number} ")
    sys.exit(40 + number)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGHUP, stop)
signal.signal(signal.SIGTERM, stop)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(120)
"""

PARENT = """
import os, sys
from xtuner_add.launch import run_child
sys.exit(run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_reaches_the_child_once_and_its_answer_is_the_exit_code(
    tmp_path: Path, number: signal.Signals
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(tmp_path)])
    child = int(_wait_for(tmp_path / "pid"))
    parent.send_signal(number)
    assert parent.wait(timeout=60) == 40 + number
    assert (tmp_path / "signals").read_text() == f"{int(number)} "
    assert not _is_running(child)


def test_closed_terminal_does_not_end_a_run_under_nohup(tmp_path: Path) -> None:
    command = ["nohup", sys.executable, "-c", PARENT, CHILD, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(tmp_path / "pid")
    parent.send_signal(signal.SIGHUP)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=60) == 40 + signal.SIGTERM
    assert (tmp_path / "signals").read_text() == f"{int(signal.SIGTERM)} "


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_child_ends_with_a_killed_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(tmp_path)])
    child = int(_wait_for(tmp_path / "pid"))
    parent.kill()
    parent.wait(timeout=60)
    assert _wait_for(tmp_path / "signals") == f"{int(signal.SIGTERM)} "
    deadline = time.monotonic() + 60
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(child)


def test_skipped_samples_are_counted_once_and_change_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "20260101_000000" / "skipped_samples.jsonl"
    outcome = tmp_path / "outcome.json"
    outcome.write_text(json.dumps({"skip_log": str(log)}))
    assert launch.report_outcome(outcome, 0) == 0
    for _ in range(2):  # two data-loader workers met the same broken file
        SkipLog(log).record("slide_7", "7.png", "truncated")
    assert launch.report_outcome(outcome, 0) == EXIT_SKIPPED == 3
    assert f"1 sample was skipped: see {log}" in capsys.readouterr().err
    SkipLog(log).record("slide_8", "8.png", "missing")
    assert launch.report_outcome(outcome, 0) == 3
    assert "2 samples were skipped" in capsys.readouterr().err


def test_an_error_is_printed_whichever_process_met_it_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the other processes then, among them the first."""
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as alone, _errors_in_one_line():
        raise ValueError("visual_select_layer=40: the encoder has 12 layers")
    assert alone.value.code == EXIT_USAGE
    assert "Error: visual_select_layer=40: the enc" in capsys.readouterr().err
    monkeypatch.setenv(launch.OUTCOME_VARIABLE, str(outcome))
    with pytest.raises(SystemExit), _errors_in_one_line():
        raise ValueError("visual_select_layer=40: the encoder has 12 layers")
    assert not capsys.readouterr().err
    assert launch.report_outcome(outcome, EXIT_FAILED) == EXIT_USAGE
    assert "Error: visual_select_layer=40: the enc" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--track", "wandb"], ["--track=wandb"]])
def test_an_option_of_ours_is_not_passed_to_xtuner(words: list[str]) -> None:
    arguments = ["a.py", *words, "--seed", "0"]
    assert launch._take_option(arguments, "--track") == "wandb"
    assert arguments == ["a.py", "--seed", "0"]
    assert launch._take_option(arguments, "--track") is None


def test_an_unknown_tracker_is_named() -> None:
    with pytest.raises(launch.LaunchError, match="--track wand: expected none, tensorboard, wandb"):
        launch.launch(MODES["train"], ["pallava_domain_alignment_tiny", "--track", "wand"])


def test_the_tracker_reaches_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmengine.config import Config

    from xtuner_add.paths import own_configs
    from xtuner_add.run_mode import configs_fitted_to_machine

    file = own_configs()["pallava_domain_alignment"]
    monkeypatch.setenv(launch.TRACKER_VARIABLE, "wandb")
    with configs_fitted_to_machine():
        cfg = Config.fromfile(file)
    assert cfg.visualizer.vis_backends[0].type == "WandbVisBackend"
    monkeypatch.setenv(launch.TRACKER_VARIABLE, "none")
    with configs_fitted_to_machine():
        assert Config.fromfile(file).visualizer is None
