"""Runs `python -m MODULE` in a process forked off one that has already imported XTuner.

Importing XTuner takes five to twelve seconds of CPU time, more than a tiny training itself. A test
whose subject is what a command does, rather than how it is started, calls `run_module`; tests of
launching, signals and several processes start real interpreters.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_FORKED_MODULE = "xtuner_add.run_mode"


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    cwd: Path,
    environ: Mapping[str, str],
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments`; returns exit code and output, stderr included."""
    command = [sys.executable, "-m", module, *arguments]
    if torch.cuda.is_available():  # CUDA does not survive a fork
        return subprocess.run(
            command, cwd=cwd, env=dict(environ), text=True, timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        process = context.Process(
            target=_run_in_child, args=(command[2:], str(cwd), dict(environ), str(output))
        )
        process.start()
        process.join(timeout_s)
        text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout_s, output=text)
    return subprocess.CompletedProcess(command, int(process.exitcode or 0), text)


def run_child(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Replaces `xtuner_add.launch.run_child` in tests that call commands in their own process."""
    if list(command[1:3]) != ["-m", _FORKED_MODULE]:
        return subprocess.run(command, env=dict(environ)).returncode
    done = run_module(command[2], command[3:], cwd=Path.cwd(), environ=environ)
    print(done.stdout)
    return done.returncode


def _run_in_child(words: list[str], cwd: str, environ: dict[str, str], output: str) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    # A command that starts another Python module gets a fork as well.
    import xtuner_add.launch

    real_run_child = xtuner_add.launch.run_child

    def forked_child(command: Sequence[str], environ: Mapping[str, str]) -> int:
        if list(command[1:3]) != ["-m", _FORKED_MODULE]:
            return real_run_child(command, environ)
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        atexit._clear()  # it would remove the temporary folder of `launch`
        os._exit(_run_as_main(list(command[2:]), environ))

    xtuner_add.launch.run_child = forked_child
    raise SystemExit(_run_as_main(words, environ))


def _run_as_main(words: list[str], environ: Mapping[str, str]) -> int:
    """Does what an interpreter does between its start and its end; returns the exit code."""
    os.environ.clear()
    os.environ.update(environ)
    sys.path.insert(0, os.getcwd())
    sys.argv = words
    code: object = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)
