"""Starts a converter repeatedly, kills it at random moments, and checks what it left.

Usage: python -m tests.pallava.release.killer JOB_JSON.

A process that has imported everything forks one child a run, so that dozens of
kills cost no imports. Prints how many runs were killed and how many finished.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft  # noqa: F401 - or every child would import it
import torch

from pallava.folder_build import read_manifest
from pallava.release.export import export
from pallava.release.merge import merge
from pallava.release.pth_to_hf import Recipe, convert_checkpoint
from pathcore.files import sha256_of
from tests.killing import finishes


def converter(job: dict[str, object]) -> Callable[[Path], None]:
    paths = [Path(str(path)) for path in job["paths"]]  # type: ignore[attr-defined]
    if job["kind"] == "merge":
        return lambda out: merge(paths[0], paths[1:], out, device="cpu", progress=False) and None
    if job["kind"] == "pth-to-hf":
        recipe = Recipe(**job["recipe"])  # type: ignore[arg-type]
        return lambda out: convert_checkpoint(paths[0], recipe, out) and None
    return lambda out: export(paths[0], paths[1], out, device="cpu", progress=False) and None


def run(convert: Callable[[Path], None], out: Path, kill_after_s: float | None) -> bool:
    """Runs a converter in a child; returns whether it finished."""

    def work() -> None:
        torch.set_num_threads(2)  # two shards at a time
        convert(out)

    return finishes(work, kill_after_s)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def check(out: Path, whole: dict[str, str]) -> None:
    """A folder under its name is whole; one under construction does not load unless it is."""
    if out.is_dir():
        assert digests(out) == whole, "a folder under its final name that is not whole"
    partial = out.with_name(f"{out.name}.partial")
    if (partial / "config.json").is_file():
        found = digests(partial)
        absent = {name for name in whole if name not in found}
        assert not absent, f"loads as whole, but lacks {absent}"
    _, rows = read_manifest(partial)
    for name, row in rows.items():
        assert sha256_of(partial / name) == row["sha256"], f"{name} is recorded but not whole"


def main() -> None:
    job = json.loads(sys.argv[1])
    convert, root = converter(job), Path(job["root"])
    assert run(convert, root / "whole", None)
    whole = digests(root / "whole")
    start = time.perf_counter()  # of a second run: the first one reads from the disk
    assert run(convert, root / "again", None)
    seconds = time.perf_counter() - start
    generator, kills, finished = random.Random(job["seed"]), 0, 0
    out = root / "out"
    while kills < job["kills"]:
        if run(convert, out, generator.uniform(0, 1.1 * seconds)):
            finished += 1
        else:
            kills += 1
        check(out, whole)
        # Now and then to the end, so that later kills meet every stage again.
        if out.is_dir() or generator.random() < 0.15:
            assert run(convert, out, None)
            assert digests(out) == whole, "a rerun gives other files"
            shutil.rmtree(out)
    assert run(convert, out, None)
    assert digests(out) == whole
    print("KILLS", kills, "FINISHED", finished)


if __name__ == "__main__":
    main()
