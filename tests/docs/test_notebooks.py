"""Every tutorial runs, and gives the kinds of output that are stored in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.reading import ROOT

FOLDER = ROOT / "docs/tutorials"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))

LEARNT = {
    "2_patch_classifier.ipynb": (r"not trained on: (\d\.\d+)", 0.8),
    "3_captions_clip.ipynb": (r"balanced accuracy \| (\d\.\d+)", 0.5),
    "4_pallava.ipynb": (r"(\d+ of \d+) held-out answers are right", 0.6),
    "5_ask_a_slide.ipynb": (r"(\d+ of \d+) are right", 0.8),
}
"""The score that a tutorial prints, and what it must at least be; chance is below 0.5 in each."""


def outputs(notebook: Any) -> list[list[str]]:
    """The kinds of outputs of each code cell; text that follows text counts once."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kinds = [output.get("name", output.output_type) for output in cell.outputs]
            found.append(sorted(set(kinds) - {"stderr"}))
    return found


def text(notebook: Any) -> str:
    """What the cells print."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5 and set(LEARNT) < set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_small_and_whole(name: str) -> None:
    assert (FOLDER / name).stat().st_size < 400_000
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert any("display_data" in kinds for kinds in outputs(notebook)), "no picture"
    assert "stdout" in outputs(notebook)[-2] + outputs(notebook)[-1]
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert "image/png" not in output.get("data", {}), "JPEG takes a quarter"
            assert "/tmp/" not in output.get("text", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_tutorial_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)  # a tutorial asks a server of its own
    notebook = nbformat.read(FOLDER / name, as_version=4)
    stored = outputs(notebook)
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert outputs(notebook) == stored, "run `make notebooks` and look at what changed"
    if name in LEARNT:
        pattern, least = LEARNT[name]
        found = re.search(pattern, text(notebook))
        assert found, pattern
        right, _, total = found[1].partition(" of ")
        assert float(right) / float(total or 1) >= least
