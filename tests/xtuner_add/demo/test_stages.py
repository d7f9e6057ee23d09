from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xtuner_add.demo.stages import (
    MANIFEST,
    Clock,
    Manifest,
    Stage,
    StageError,
    only_run_in,
    run_command,
    stopped,
)


def stage(folder: Path, runs: list[str], setting: int = 1, name: str = "first") -> Stage:
    def run() -> None:
        runs.append(name)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "out").write_text(str(setting))

    return Stage(name, run, (f"{name}/out",), {"setting": setting}, owned=(name,))


def test_finished_stage_is_skipped_also_by_a_new_process(tmp_path: Path) -> None:
    runs: list[str] = []
    for _ in range(2):
        Manifest(tmp_path).run(stage(tmp_path, runs), [])
    assert runs == ["first"]


def test_changed_setting_runs_the_stage_and_those_after_it_again(tmp_path: Path) -> None:
    runs: list[str] = []
    for setting in (1, 2):
        manifest = Manifest(tmp_path)
        manifest.run(stage(tmp_path, runs, setting), [])
        manifest.run(stage(tmp_path, runs, name="second"), ["first"])
    assert runs == ["first", "second"] * 2
    assert (tmp_path / "first" / "out").read_text() == "2"


def test_lost_output_runs_the_stage_again(tmp_path: Path) -> None:
    runs: list[str] = []
    Manifest(tmp_path).run(stage(tmp_path, runs), [])
    (tmp_path / "first" / "out").unlink()
    Manifest(tmp_path).run(stage(tmp_path, runs), [])
    assert runs == ["first", "first"]


def test_failed_stage_is_not_done_and_keeps_what_it_has_for_the_next_try(tmp_path: Path) -> None:
    def fail() -> None:
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "checkpoint").touch()
        raise StageError("no luck")

    broken = Stage("first", fail, ("first/out",), {"setting": 1}, owned=("first",))
    with pytest.raises(StageError, match="no luck"):
        Manifest(tmp_path).run(broken, [])
    assert not json.loads((tmp_path / MANIFEST).read_text())["first"]["done"]
    runs: list[str] = []
    Manifest(tmp_path).run(stage(tmp_path, runs), [])
    assert runs == ["first"]
    assert (tmp_path / "first" / "checkpoint").exists()


def test_stage_without_its_output_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="ended without"):
        Manifest(tmp_path).run(Stage("empty", lambda: None, ("nothing",), {}), [])


def test_failed_command_shows_its_last_words_and_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "train.log"
    with pytest.raises(StageError, match="no_such_config") as error:
        run_command(["train", "no_such_config"], tmp_path, log, "training", 0)
    assert str(log) in str(error.value)
    assert "no_such_config" in log.read_text()


def test_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        only_run_in(tmp_path),
        pytest.raises(StageError, match="another process"),
        only_run_in(tmp_path),
    ):
        pass
    with only_run_in(tmp_path):  # left by a run that was killed before its first stage ended
        assert not stopped()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "theirs.txt").write_text("mine")
    with pytest.raises(StageError, match="holds other files"), only_run_in(tmp_path):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "theirs.txt"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
def test_killed_run_leaves_no_command_behind(tmp_path: Path) -> None:
    """SIGKILL, which no handler sees: the kernel ends what the run had started."""
    sleeper = tmp_path / "sleeper.py"
    pid_file = tmp_path / "pid"
    sleeper.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    code = (
        "import sys; from pathlib import Path; from xtuner_add.demo import stages\n"
        f"stages._COMMAND = [sys.executable, {str(sleeper)!r}]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "stages.run_command([], folder, folder / 'log', 'x', 0)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    pid = _wait_for(lambda: pid_file.read_text() if pid_file.exists() else "")
    run.kill()
    run.wait()
    _wait_for(lambda: "gone" if not _is_running(int(pid)) else "")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(value: Callable[[], str]) -> str:
    for _ in range(600):
        if found := value():
            return found
        time.sleep(0.1)
    raise AssertionError("waited a minute in vain")


def test_the_clock_scales_the_expected_time_by_the_pace_so_far() -> None:
    now = 100.0
    rounds = [["data"], ["text", "images"], ["answers"]]
    clock = Clock(rounds, {"data": 10, "text": 20, "images": 40, "answers": 5}, lambda: now)
    assert clock.begin() == " 0:00  1/3 data; about 0:55 left"
    now += 4
    assert clock.line() == " 0:04  1/3 data; about 0:51 left"
    now += 16  # twice as slow as expected
    assert clock.begin() == " 0:20  2/3 text and images; about 1:30 left"
    now += 200  # longer than expected: at least the last round is left
    assert clock.line() == " 3:40  2/3 text and images; about 0:10 left"
    assert clock.begin().startswith(" 3:40  3/3 answers; about 0:22 left")


def test_the_clock_learns_nothing_from_rounds_of_an_earlier_run() -> None:
    now = 0.0
    clock = Clock([["a"], ["b"]], {"a": 10, "b": 20}, lambda: now)
    clock.begin()
    now += 0.1
    assert clock.begin() == " 0:00  2/2 b; about 0:20 left"


def test_the_clock_says_no_more_than_it_knows() -> None:
    clock = Clock([["a"], ["b"]], {"a": 10}, lambda: 0.0)
    assert clock.begin() == " 0:00  1/2 a; more than 0:10 left"
    assert Clock([["a"], ["b"]], {}, lambda: 0.0).begin() == " 0:00  1/2 a"


def test_expected_times_are_of_stages_that_there_are(tmp_path: Path) -> None:
    from xtuner_add.demo.pallava import pipeline as pallava
    from xtuner_add.demo.pathgen import pipeline as pathgen

    for demo in (pallava, pathgen):
        rounds = demo._Stages(tmp_path, demo.Plan(), 0).rounds()
        names = {stage.name for stages in rounds for stage in stages}
        assert demo.EXPECTED_SECONDS.keys() <= names
