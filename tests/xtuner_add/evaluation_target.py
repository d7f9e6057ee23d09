"""Runs an evaluation repeatedly, killed at every change on disk and at random times.

Prints one JSON object per kill: what it left, and the result of the rerun. Runs are forked
from one process that has imported everything, so that dozens of kills take seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import pallava.evaluation.runs
from pathcore.files import sha256_of
from xtuner_add.cli import main

_COUNTED = ("write", "fsync", "replace")


def kill_at(number: int) -> None:
    """Makes this process die by SIGKILL at its `number`-th write, fsync or rename, half-way."""
    count = 0
    originals: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _COUNTED}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if name == "write":  # half of what was meant
                    content = bytes(arguments[1])
                    originals[name](arguments[0], content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return originals[name](*arguments)

        return call

    for name in _COUNTED:
        setattr(os, name, counted(name))


def run(
    arguments: list[str], number: int | None = None, killed_after_s: float | None = None
) -> int:
    """Runs the command line in a fork; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        if number is not None:
            kill_at(number)
        try:
            main(arguments)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    if killed_after_s is not None:
        time.sleep(killed_after_s)
        os.kill(child, signal.SIGKILL)  # it is not reaped yet: the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a report."""
    files = (path for path in folder.glob("*") if path.is_file() and path.name != "run.json")
    return {path.name: sha256_of(path) for path in files}


def kill_at_every_change(arguments: list[str]) -> None:
    """Each number of changes in a folder of its own, until a run has fewer."""
    for number in range(1, 200):
        work_dir = Path(f"killed_{number}")
        command = [*arguments, "--work-dir", str(work_dir)]
        killed = run(command, number)
        left = digests(work_dir)
        again = run(command)
        print(
            json.dumps({"killed": killed, "left": left, "again": again, "end": digests(work_dir)}),
            flush=True,
        )
        if killed == 0:
            break


def kill_at_random(arguments: list[str], num_kills: int = 24) -> None:
    """All kills in one folder, spread over the time that a whole run takes."""
    start = time.monotonic()
    run([*arguments, "--work-dir", "timed"])
    duration_s = time.monotonic() - start
    generator, work_dir = random.Random(5), Path("random")
    command = [*arguments, "--work-dir", str(work_dir)]
    for _ in range(num_kills):
        killed = run(command, killed_after_s=generator.uniform(0.0, duration_s))
        left = digests(work_dir)
        print(json.dumps({"random": killed, "left": left}), flush=True)
    print(json.dumps({"again": run(command), "end": digests(work_dir)}), flush=True)


if __name__ == "__main__":
    assert pallava.evaluation.runs is not None
    kill_at_every_change(sys.argv[1:])
    kill_at_random(sys.argv[1:])
