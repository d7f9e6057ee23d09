"""Describes rows in a process of its own, to be killed, by a test or by itself.

Usage: python -m tests.pathgen.agents_killed URL ROWS OUT IMAGES [KILLS].

With KILLS it runs the step again and again in children, kills them at random
moments, and looks at what each left.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import openai  # noqa: F401 - once, and not in every child
import PIL.Image  # noqa: F401

from pathcore.chat_backends import OpenAIBackend
from pathgen.agents.captions import describe
from pathgen.agents.steps import run_step, skipped_path
from tests.killing import finishes


def run(url: str, rows: str, out: str, images: str, concurrency: int = 1) -> None:
    backend = OpenAIBackend(url, "m", concurrency=concurrency)
    run_step(describe(), backend, rows, out, images=images, progress=False)


def run_child(arguments: list[str], kill_after_s: float | None) -> bool:
    """Runs the step in a child; returns whether it finished."""
    return finishes(lambda: run(*arguments, concurrency=4), kill_after_s)


def kill_again_and_again(arguments: list[str], kills: int) -> None:
    """Kills the step so often; whatever has a name is whole, and the end is always the same."""
    out = Path(arguments[2])
    outputs = [out, skipped_path(out)]
    start = time.perf_counter()
    assert run_child(arguments, None)
    seconds = time.perf_counter() - start
    whole = [path.read_bytes() for path in outputs]
    generator, killed, ends = random.Random(kills), 0, 1

    def start_anew() -> None:
        for path in out.parent.glob(f"{out.stem}.*"):
            path.unlink()

    start_anew()
    while killed < kills:
        killed += not run_child(arguments, generator.uniform(0, seconds))
        for path, content in zip(outputs, whole, strict=True):
            assert not path.exists() or path.read_bytes() == content, f"{path} is not whole"
        if out.exists() or killed == kills:
            assert run_child(arguments, None)
            assert [path.read_bytes() for path in outputs] == whole
            assert not list(out.parent.glob("*partial*"))
            ends += 1
            start_anew()
    print("KILLED", killed, "ENDS", ends)


if __name__ == "__main__":
    *arguments, last = sys.argv[1:]
    if last.isdecimal():
        kill_again_and_again(arguments, int(last))
    else:
        run(*arguments, last)
