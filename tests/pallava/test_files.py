from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallava.files import (
    MANIFEST_NAME,
    FolderBuild,
    OutputExistsError,
    atomic_file,
    read_manifest,
    sha256_of,
    staged_files,
    write_json,
)


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


def build(out: Path, names: str, inputs: dict[str, object], fail_at: str = "") -> list[str]:
    """Builds one file a letter; returns which were made now."""
    made = []
    with FolderBuild(out, inputs) as job:
        for name in names:
            if job.complete or job.has(name):
                continue
            with job.file(name) as path:
                if name == fail_at:
                    raise RuntimeError(name)
                path.write_text(name * 10)
            made.append(name)
        job.finish()
    return made


def test_a_build_continues_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(RuntimeError):
        build(out, "abcd", {"v": 1}, fail_at="c")
    assert not out.exists() and (tmp_path / "model.partial").is_dir()
    assert build(out, "abcd", {"v": 1}) == ["c", "d"]
    _, rows = read_manifest(out)
    assert {name: row["sha256"] for name, row in rows.items()} == {
        name: sha256_of(out / name) for name in "abcd"
    }
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "c", "d", MANIFEST_NAME]
    assert build(out, "abcd", {"v": 1}) == []


def test_other_inputs_start_anew(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(RuntimeError):
        build(out, "ab", {"v": 1}, fail_at="b")
    assert build(out, "xb", {"v": 2}) == ["x", "b"]
    assert not (out / "a").exists()
    with pytest.raises(OutputExistsError, match="holds something else already"):
        build(out, "ab", {"v": 1})


def test_a_file_that_changed_is_found(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with FolderBuild(out, {}) as job:
        with job.file("a") as path:
            path.write_text("right")
        (job.folder / "a").write_text("wrong")
        with pytest.raises(OSError, match="reads back differently"):
            job.finish()
    assert not out.exists()


def test_two_processes_do_not_build_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "model"
    code = f"from pallava.files import FolderBuild\nwith FolderBuild({str(out)!r}, {{}}): pass"
    with FolderBuild(out, {}):
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
    assert child.returncode != 0 and "another process is building" in child.stderr
