"""Safe names, atomic files, locks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathcore import files
from pathcore.files import (
    FolderInUseError,
    UnsafeNameError,
    atomic_file,
    check_name,
    folder_lock,
    staged_files,
    write_json,
)


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "...", "a/b", "../x", "/etc/passwd", "a\\b", "a\0b", "a\nb", " a", "a ",
     "\ud800", 7, None, ["a"], "x" * 256, "é" * 128, "\x7f"],
)  # fmt: skip
def test_names_that_are_no_file_names(name: object) -> None:
    with pytest.raises(UnsafeNameError, match="id"):
        check_name(name)


@given(st.text(max_size=300), st.integers(0, 60))
def test_a_name_that_passes_stays_in_its_folder(
    tmp_path_factory: pytest.TempPathFactory, name: str, room_bytes: int
) -> None:
    try:
        checked = check_name(name, room_bytes=room_bytes)
    except UnsafeNameError:
        return
    assert checked == name
    folder = tmp_path_factory.getbasetemp()
    path = folder / (name + "x" * room_bytes)
    assert path.parent == folder
    path.touch()  # the file system takes it
    path.unlink()


def test_tcga_names_pass() -> None:
    name = "TCGA-F7-A50J-01Z-00-DX1.D754F90E-8C16-4EFB-97A4-27591CBC250D"
    assert check_name(name) == name


def test_a_file_whose_writing_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as partial:
        partial.write_text("new, cut o")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOCK_PATIENCE_S", 0.1)
    code = (
        "import sys, time; from pathlib import Path; from pathcore.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "job" / "lock"
    lock.parent.mkdir()
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match="another process"), folder_lock(lock):
            pass
        other.kill()
        other.wait()
        with folder_lock(lock):
            pass


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"), folder_lock(tmp_path / ".lock"):
        pass
    monkeypatch.undo()
    with folder_lock(tmp_path / ".lock"):
        pass


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    write_json(target, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_staged_files_never_mix_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops at every rename in turn: what is left never has the old weights beside a new config."""
    with staged_files(tmp_path, last="weights") as stage:
        (stage / "config").write_text("old")
        (stage / "weights").write_text("old")
    (tmp_path / "tokenizer").write_text("kept")
    replace, stop_at = os.replace, 0

    def stopping(source: object, target: object) -> None:
        nonlocal stop_at
        if stop_at == 0:
            raise KeyboardInterrupt
        stop_at -= 1
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", stopping)
    for number in range(2):
        stop_at = number
        with pytest.raises(KeyboardInterrupt), staged_files(tmp_path, last="weights") as stage:
            (stage / "config").write_text("new")
            (stage / "weights").write_text("new")
        assert not (tmp_path / "weights").exists()
    stop_at = 2
    with staged_files(tmp_path, last="weights") as stage:
        (stage / "config").write_text("new")
        (stage / "weights").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config": "new",
        "weights": "new",
        "tokenizer": "kept",
    }
