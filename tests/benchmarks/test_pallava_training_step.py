"""The benchmark runs every case, and stored features give the losses of encoded images."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.pallava_training_step import BASELINES, CASES, main


def test_stored_features_give_the_same_losses(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--quick", "--rounds", "2", "--no-memory", "--json", str(path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    steps = {row["name"]: row for row in json.loads(path.read_text())}
    assert set(steps) == set(CASES) == set(BASELINES) | set(BASELINES.values())
    assert all(seconds > 0 for step in steps.values() for seconds in step["cpu_s"])
    for name in ("ours, six sub-images", "vision-bound"):
        losses = [step["loss"] for step in (steps[name], steps[f"{name}, stored"])]
        assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
        assert f"| {name}, stored" in result.output
