"""Runs a job in a forked child and kills it, and lists what a job leaves in its folder."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pathcore.files import sha256_of


def finishes(work: Callable[[], object], kill_after_s: float | None) -> bool:
    """Returns whether `work` finishes in a child that is killed after `kill_after_s` seconds.

    The caller imports everything beforehand, so that dozens of kills cost no imports.

    Args:
        work: Job to run.
        kill_after_s: Seconds until SIGKILL; None lets the child finish.
    """
    child = os.fork()
    if child == 0:
        gc.freeze()  # or each collection of a library looks at all that the caller imported
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the job failed by itself"
    return not os.WIFSIGNALED(status)


def visible_digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file by relative path, without names that begin with a dot.

    Files under construction have such names.
    """
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }
