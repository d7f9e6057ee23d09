"""Runs `python -m MODULE` in a process forked off one that has already imported XTuner.

Importing XTuner takes five to twelve seconds of CPU time, more than a tiny training itself. A test
whose subject is what a command does, rather than how it is started, calls `run_module`; tests of
launching and signals start real interpreters.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    cwd: Path,
    environ: Mapping[str, str] = os.environ,
    processes: int = 1,
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments`, several as torchrun does; returns exit code and output.

    A command that starts another Python module, in one process or by torchrun, gets forks as well.
    """
    command = [sys.executable, "-m", module, *arguments]
    if processes > 1:
        command[2:2] = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command.insert(5, "-m")
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
            target=_run_in_child, args=(command, str(cwd), dict(environ), str(output))
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
    if list(command[1:3]) != ["-m", "xtuner_add.run_mode"]:
        return subprocess.run(command, env=dict(environ)).returncode
    done = run_module(command[2], command[3:], cwd=Path.cwd(), environ=environ)
    print(done.stdout)
    return done.returncode


def _run_in_child(command: list[str], cwd: str, environ: dict[str, str], output: str) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    import xtuner_add.launch

    xtuner_add.launch.run_child = _run_forked
    raise SystemExit(_run_forked(command, environ))


def _run_forked(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Forks the processes of `python -m MODULE` or of torchrun; returns their exit code."""
    words, num_ranks = list(command[2:]), 1
    if words[0] == "torch.distributed.run":
        count = next(word for word in words if word.startswith("--nproc_per_node="))
        num_ranks = int(count.partition("=")[2])
        words = words[words.index("-m") + 1 :]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    children = []
    for rank in range(num_ranks):
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            children.append(child)
            continue
        atexit._clear()  # it would remove the temporary folder of `launch`
        if num_ranks > 1:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            environ = {**environ, **address, **own, "LOCAL_WORLD_SIZE": str(num_ranks)}
        os._exit(_run_as_main(words, environ))
    codes = []
    while children:
        child, status = os.wait()
        children.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGTERM)
    if num_ranks > 1:  # torchrun's own exit code
        return int(any(codes))
    return codes[0]


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
