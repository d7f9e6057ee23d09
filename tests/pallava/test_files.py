"""Files that are whole or absent, alone and several together."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pallava.files import atomic_file, staged_files, write_json


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
