from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.startup import SIDES, main


@pytest.mark.slow
def test_both_commands_are_measured_on_both_sides(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["--quick", "--json", str(tmp_path / "seconds.json")])
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / "seconds.json").read_text())
    assert [row["name"] for row in rows] == ["train to its first step", "answer"]
    for row in rows:
        sides = row["cpu_s"]
        assert row["ratio"] > 0
        assert list(sides) == list(SIDES)
        assert all(len(values) == 1 and values[0] > 0.5 for values in sides.values())
