"""Starts an extraction repeatedly, kills it at random moments, and checks what it left.

Usage: python -m tests.wsi.killer JOB_JSON.

A process that has imported everything forks one child a run, so that dozens of
kills cost no imports. Prints how many runs were killed and how many finished.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import imagecodecs  # noqa: F401
import openslide  # noqa: F401
import tifffile  # noqa: F401

from pathcore.files import folder_lock
from tests.killing import finishes, visible_digests
from wsi.extraction import OutputSettings, extract
from wsi.requests import PatchRequest


def run(job: dict[str, Any], out: Path, kill_after_s: float | None) -> bool:
    """Extracts in a child; returns whether it finished."""

    def work() -> None:
        extract(
            lambda: (PatchRequest(*row) for row in job["rows"]),
            job["slides"],
            out,
            settings=OutputSettings(job["layout"], "jpg", part_size=3),
            source={},
            workers=job["workers"],
            progress=False,
        )

    return finishes(work, kill_after_s)


def check(out: Path, whole: dict[str, str], seen: set[str]) -> None:
    """Whatever has a name is whole, and nothing that was there is gone."""
    found = visible_digests(out)
    assert found.items() <= whole.items(), "a file under its final name that is not whole"
    assert seen <= found.keys(), "a file that was there is gone"
    seen |= found.keys()
    for record in (out / ".job" / "records").glob("[0-9]*.jsonl"):
        for line in record.read_bytes().splitlines()[1:]:
            assert json.loads(line)["file"] in found, "recorded, but not there"


def main() -> None:
    job = json.loads(sys.argv[1])
    root = Path(job["root"])
    start = time.perf_counter()
    assert run(job, root / "whole", None)
    seconds = time.perf_counter() - start
    whole = visible_digests(root / "whole")
    generator, kills, finished = random.Random(job["seed"]), 0, 0
    out, seen = root / "out", set[str]()
    while kills < job["kills"]:
        if run(job, out, generator.uniform(0, 1.1 * seconds)):
            finished += 1
        else:
            kills += 1
        if (out / ".job").is_dir():
            with folder_lock(out / ".job" / "lock"):  # until the workers have noticed, too
                check(out, whole, seen)
        if (out / "report.json").is_file() or generator.random() < 0.1:
            assert run(job, out, None)
            assert visible_digests(out) == whole, "a continued run gives other files"
            shutil.rmtree(out)
            seen.clear()
    assert run(job, out, None)
    assert visible_digests(out) == whole
    leftovers = [path.name for path in out.iterdir() if path.name.startswith(".")]
    print("KILLS", kills, "FINISHED", finished, "LEFTOVERS", leftovers)


if __name__ == "__main__":
    main()
