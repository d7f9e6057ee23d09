from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.merge import main


@pytest.mark.slow
def test_both_programs_merge_and_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--work-dir", str(tmp_path / "work"), "--json", str(tmp_path / "ratios.json")])
    output = capsys.readouterr().out
    assert output.count("exit_code=0") == 3
    assert "wall time, ours over the floor" in output
    rows = json.loads((tmp_path / "ratios.json").read_text())
    assert [row["name"] for row in rows] == ["wall time", "memory"]
    assert all(row["range"] == [row["ratio"]] * 2 for row in rows)
    assert not (tmp_path / "work").exists()
