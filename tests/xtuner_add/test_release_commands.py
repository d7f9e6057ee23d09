from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from tests.pallava.release.models import load, save_adapter, save_llama
from xtuner_add.cli import main

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_merge_check_split_extract(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    one = save_adapter(base, tmp_path / "one")
    two = save_adapter(base, tmp_path / "two", seed=2)
    out = tmp_path / "out"
    result = call("merge", base, one, two, out)
    assert result.exit_code == 0 and "digests verified" in result.output, result.output
    assert call("merge", base, one, two, out).exit_code == 0, "a finished merge is left as it is"
    assert call("check-merge", base, one, two, out).exit_code == 0
    result = call("check-merge", base, one, out)
    assert result.exit_code == 1 and "is not" in result.output
    result = call("split", out, tmp_path / "split")
    assert result.exit_code == 0, result.output
    load(tmp_path / "split")
    result = call("extract-adapter", base, out, tmp_path / "adapter", "--rank", 8)
    assert result.exit_code == 0, result.output


def test_errors_are_one_line(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    result = call("merge", base, tmp_path / "empty", tmp_path / "out")
    assert result.exit_code == 1 and "adapter_config.json" in result.output
    assert "Traceback" not in result.output
