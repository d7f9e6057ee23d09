"""Runs `python -m MODULE` in a process forked off one that has already imported XTuner.

Importing XTuner takes five to twelve seconds of CPU time, more than a tiny training itself. A test
whose subject is what a command does, rather than how it is started, calls `run_module`; tests of
launching and signals start real interpreters.
"""

from __future__ import annotations

import atexit
import itertools
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
from multiprocessing import forkserver
from pathlib import Path

import torch

_REPOSITORY = Path(__file__).parents[1]


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    cwd: Path,
    environ: Mapping[str, str] = os.environ,
    ranks: int | None = None,
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments`; returns exit code and output.

    A command that starts another Python module, in one process or by torchrun, gets forks as well.

    Args:
        module: Name of a module, or path of a script.
        arguments: Its arguments.
        cwd: Working directory.
        environ: Environment variables.
        ranks: Number of processes, with the environment variables of torchrun.
        timeout_s: Timeout in seconds.
    """
    words = [module] if module.endswith(".py") else ["-m", module]
    command = [sys.executable, *words, *arguments]
    if ranks is not None:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    if torch.cuda.is_available():  # CUDA does not survive a fork
        return subprocess.run(
            command, cwd=cwd, env=dict(environ), text=True, timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    _start_server()
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


def _start_server() -> None:
    """Starts the fork server, unless it runs, with this repository first on its path.

    A host installs a package `tests` too, and would win if a test has left the repository's folder.
    """
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_REPOSITORY), path)))
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


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
    multiprocessing.set_start_method("fork", force=True)  # as in an interpreter of its own
    import xtuner_add.launch
    from pallava.engine import runtime

    # The imports have prepared a host without ranks; the stub is one of these preparations.
    runtime.prepare_host.cache_clear()
    sys.modules.pop("deepspeed.runtime.fp16.onebit", None)

    xtuner_add.launch.run_child = _run_forked
    raise SystemExit(_run_forked(command, environ))


def _run_forked(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Forks the processes of `python -m MODULE` or of torchrun; returns their exit code."""
    words, num_ranks = list(command[1:]), None
    if words[:2] == ["-m", "torch.distributed.run"]:
        options = list(itertools.takewhile(lambda word: word.startswith("--"), words[2:]))
        count = next(word for word in options if word.startswith("--nproc_per_node="))
        num_ranks, words = int(count.partition("=")[2]), words[2 + len(options) :]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    children = []
    for rank in range(num_ranks or 1):
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            children.append(child)
            continue
        atexit._clear()  # it would remove the temporary folder of `launch`
        if num_ranks:
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
    return int(any(codes)) if num_ranks else codes[0]  # that of torchrun itself is 1


def _run_as_main(words: list[str], environ: Mapping[str, str]) -> int:
    """Does what an interpreter does between its start and its end; returns the exit code."""
    os.environ.clear()
    os.environ.update(environ)
    is_module, sys.argv = words[0] == "-m", words[words[0] == "-m" :]
    sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(words[0]))
    code: object = 0
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
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
