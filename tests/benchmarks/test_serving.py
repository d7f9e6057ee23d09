from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.__main__ import QUICK
from benchmarks.serving import SIDES, main


def test_both_sides_give_the_same_answers_to_every_client(tmp_path: Path) -> None:
    assert "serving" in QUICK
    found = CliRunner().invoke(main, ["--quick", "--json", str(tmp_path / "runs.json")])
    assert found.exit_code == 0, found.output
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [(run["side"], run["clients"]) for run in runs] == [
        (side, clients) for clients in (1, 3) for side in SIDES
    ]
    for run in runs:
        assert len(run["asked"]) == 2 * run["clients"]  # two questions each
        assert all(0 < asked["first_s"] <= asked["whole_s"] for asked in run["asked"])
        assert all(6 <= asked["num_tokens"] <= 10 for asked in run["asked"])
