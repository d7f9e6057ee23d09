"""The documented example of a custom dataset, installed as a third-party package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.pallava.converters.published import read_lines, save_image, write_csv

DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"


def test_a_dataset_of_ones_own_in_thirty_lines(tmp_path: Path) -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## A dataset of your own")[2]
    example = re.findall(r"```python\n(.*?)```", section, re.S)[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 30
    site = tmp_path / "site"
    info = site / "teaching-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "teaching_set_package.py").write_text(example, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: teaching\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[xtuner_add.plugins]\nteaching = teaching_set_package\n"
    )
    rows = [[f"{n}.png", f"Finding {n}.", "colon" if n else "skin"] for n in range(20)]
    cases = write_csv(tmp_path / "cases.csv", "file,finding,organ", [*rows, ["x.png"]])
    for number in range(20):
        save_image(tmp_path / f"{number}.png")

    command = ["convert-dataset", "teaching-set", str(cases), str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "xtuner_add.cli", *command, "--option", "organ=colon"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3, result.stderr
    pairs = read_lines(tmp_path / "out" / "pairs.jsonl")
    assert len(pairs) == 19 and pairs[0] == {
        "id": "teaching-1", "image": "1.png", "caption": "Finding 1.", "organ": "colon",
        "source": "teaching set", "licence": "internal",
    }  # fmt: skip
    report = json.loads((tmp_path / "out" / "conversion.json").read_bytes())
    assert report["num_excluded"] == 1 and report["num_skipped"] == 1
