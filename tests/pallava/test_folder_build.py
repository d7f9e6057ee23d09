"""Folders that are built file by file: continued, verified, one builder at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pallava.folder_build import MANIFEST_NAME, FolderBuild, read_manifest
from pathcore.files import OutputExistsError, sha256_of


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
    with pytest.raises(
        OutputExistsError, match="already exists and holds the result of other inputs"
    ):
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
    code = (
        f"from pallava.folder_build import FolderBuild\nwith FolderBuild({str(out)!r}, {{}}): pass"
    )
    with FolderBuild(out, {}):
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
    assert child.returncode != 0 and "another process is working" in child.stderr
