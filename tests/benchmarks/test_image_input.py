from __future__ import annotations

from click.testing import CliRunner

from benchmarks.image_input import main


def test_both_sides_agree_and_are_shown() -> None:
    result = CliRunner().invoke(main, ["--quick"])
    assert result.exit_code == 0, result.output
    assert "| 500 x 400   |            6 |" in result.output
