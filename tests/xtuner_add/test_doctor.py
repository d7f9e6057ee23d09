"""`xtuner-add doctor`: facts of the machine, and whether encoders can be loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pathcore.encoders import list_encoders
from pathcore.encoders.availability import availability
from xtuner_add import cli


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["doctor", *arguments])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return tmp_path


def test_one_fact_a_line(cache: Path) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    lines = {line.split(":")[0].split(" ")[0]: line for line in result.output.splitlines()}
    assert {"xtuner-add", "extra", "torch", "memory", "disk", "hub", "encoders"} <= set(lines)
    assert "no token" in lines["hub"] and str(cache) in lines["hub"]
    assert f"0 of {len(list_encoders())} can be loaded" in lines["encoders"]
    assert "GiB free" in lines["disk"]


def test_named_encoders_decide_the_exit_code(cache: Path) -> None:
    result = run("uni2-h", "conch", "ctranspath", "phikon")
    assert result.exit_code == 1
    said = {line.split()[1].rstrip(":"): line for line in result.output.splitlines()}
    assert "accept the terms at https://huggingface.co/MahmoodLab/UNI2-h" in said["uni2-h"]
    assert "pip install git+https://github.com/mahmoodlab/CONCH" in said["conch"]
    assert "ctranspath@/path/ctranspath.pth" in said["ctranspath"]
    assert "would be fetched from" in said["phikon"]
    snapshot = cache / "models--MahmoodLab--UNI2-h"
    (snapshot / "snapshots" / "0" / "x").mkdir(parents=True)
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0")
    (snapshot / "snapshots" / "0" / "pytorch_model.bin").write_bytes(b"weights")
    assert availability("uni2-h").ready
    result = run("uni2-h")
    assert result.exit_code == 0 and "weights in the hub's cache" in result.output


def test_torch_and_torchvision_of_two_builds_are_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(failing)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    result = run()
    assert result.exit_code == 0, result.output
    assert "torchvision cannot be imported (operator torchvision::nms does not" in result.output
    assert "do not belong together; install both in one command" in result.output


def test_an_unknown_encoder_is_wrong_use(cache: Path) -> None:
    result = run("uni2h")
    assert result.exit_code == 2 and "did you mean uni2-h" in result.output


def test_all_encoders(cache: Path) -> None:
    result = run("--all")
    assert result.exit_code == 0
    for name in list_encoders():
        assert f" {name}: " in result.output
