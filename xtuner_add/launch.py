"""Starts a mode of XTuner in one or several processes and returns its exit code.

XTuner's own command line ignores the exit code of the process that it starts, so a failed run looks
like a successful one, and it calls the first `python` on PATH instead of the running interpreter.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pallava.skipping import SkipLog
from pathcore.exit_codes import EXIT_FAILED, EXIT_SKIPPED, EXIT_USAGE
from pathcore.names import WrongArgumentError, did_you_mean
from xtuner_add.modes import Mode
from xtuner_add.paths import find_config

OUTCOME_VARIABLE = "XTUNER_ADD_OUTCOME"
"""Environment variable with the path of a file in which a training records its outcome: the path of
its log of skipped samples, or its exit code and error."""

DEBUG_VARIABLE = "XTUNER_ADD_DEBUG"
"""Environment variable that enables tracebacks in a training; set by `train --debug`."""

TRACKER_VARIABLE = "XTUNER_ADD_TRACKER"
"""Environment variable with the key of `TRACKERS`; set by `train --track`."""

TRACKERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "tensorboard": {"type": "Visualizer", "vis_backends": [{"type": "TensorboardVisBackend"}]},
    "wandb": {"type": "Visualizer", "vis_backends": [{"type": "WandbVisBackend"}]},
}
"""Values of `visualizer` in a config, by the name that `train --track` takes."""

_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class LaunchError(ValueError):
    """Raised if the environment variables describe an impossible set of processes."""


@dataclass(frozen=True)
class Processes:
    """Number of processes of a run, and the address at which they connect.

    Attributes:
        nnodes: Number of machines (`NNODES`).
        nproc_per_node: Number of processes per machine (`NPROC_PER_NODE`).
        node_rank: Index of this machine (`NODE_RANK`).
        addr: Address of machine 0 (`ADDR`).
        port: Port on machine 0 (`PORT`); with None, a single machine picks a free one.
    """

    nnodes: int = 1
    nproc_per_node: int = 1
    node_rank: int = 0
    addr: str = "127.0.0.1"
    port: int | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Processes:
        """Reads the variables that XTuner reads; an empty variable counts as unset.

        Raises:
            LaunchError: If a number is invalid, or the address for several machines is missing.
        """
        nnodes = _read_int(environ, "NNODES", 1, at_least=1)
        if nnodes > 1:
            missing = [name for name in ("NODE_RANK", "ADDR", "PORT") if not environ.get(name)]
            if missing:
                raise LaunchError(
                    f"NNODES={nnodes} needs {' and '.join(missing)} too: NODE_RANK is the number "
                    "of this machine, from 0; ADDR and PORT are those of machine 0 on all of them"
                )
        node_rank = _read_int(environ, "NODE_RANK", 0, at_least=0)
        if node_rank >= nnodes:
            raise LaunchError(f"NODE_RANK={node_rank} must be below NNODES={nnodes}")
        return cls(
            nnodes=nnodes,
            nproc_per_node=_read_int(environ, "NPROC_PER_NODE", 1, at_least=1),
            node_rank=node_rank,
            addr=environ.get("ADDR") or cls.addr,
            port=_read_int(environ, "PORT", 0, at_least=1) if environ.get("PORT") else None,
        )

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.nnodes * self.nproc_per_node > 1


def launch(mode: Mode, arguments: Sequence[str]) -> int:
    """Runs a mode in a child process and returns its exit code.

    Returns:
        0 on success; the exit code of the child on failure (128 + n if signal n ended it);
        `EXIT_SKIPPED` if a training finished but skipped samples; `EXIT_USAGE`, after printing one
        line with the reason, if a training cannot start with this config and data.

    Raises:
        FileNotFoundError: If the config is neither a file nor a known name.
        LaunchError: If the environment describes an impossible set of processes.
    """
    arguments = list(arguments)
    if mode.takes_config and arguments and not arguments[0].startswith("-"):
        arguments[0] = str(find_config(arguments[0]))
    environ = dict(os.environ)
    if mode.name == "train":
        if "--debug" in arguments:
            arguments.remove("--debug")
            environ[DEBUG_VARIABLE] = "1"
        if tracker := _take_option(arguments, "--track"):
            if tracker not in TRACKERS:
                raise LaunchError(
                    f"--track {tracker}: expected {', '.join(TRACKERS)}"
                    f"{did_you_mean(tracker, TRACKERS)}"
                )
            environ[TRACKER_VARIABLE] = tracker
        if arguments and Path(arguments[0]).is_file() and "-h" not in arguments:
            # Imported late, since help and the other modes need no config parser.
            from xtuner_add.training_check import check_training

            try:
                check_training(Path(arguments[0]), arguments[1:], environ)
            except WrongArgumentError as error:
                if DEBUG_VARIABLE in environ:
                    raise
                if environ.get("RANK", "0") == "0":
                    click.echo(f"Error: {error}", err=True)
                return EXIT_USAGE
    command = build_command(mode, arguments, environ)
    with tempfile.TemporaryDirectory(prefix="xtuner-add-") as folder:
        outcome = Path(folder, "outcome.json")
        code = run_child(command, {**child_environ(environ), OUTCOME_VARIABLE: str(outcome)})
        return report_outcome(outcome, code) if outcome.is_file() else code


def build_command(mode: Mode, arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Returns the command line that runs a mode in the processes that `environ` asks for.

    Raises:
        LaunchError: If the environment describes an impossible set of processes.
    """
    runner = ["-m", "xtuner_add.run_mode", mode.name, *arguments]
    launcher = _launcher(arguments)
    # Slurm, or a torchrun that the user called, has already started the processes.
    if not mode.distributed or launcher in ("slurm", "mpi") or "RANK" in environ:
        return [sys.executable, *runner]
    suffix = () if launcher == "pytorch" else ("--launcher", "pytorch")
    command = torchrun_command([*runner, *suffix], environ, always=launcher == "pytorch")
    return [sys.executable, *runner] if command is None else command


def torchrun_command(
    runner: Sequence[str], environ: Mapping[str, str], *, always: bool = False
) -> list[str] | None:
    """Returns the command line that starts `runner` in the processes that `environ` asks for.

    Args:
        runner: Arguments of the Python interpreter in each process.
        environ: Environment variables, `NPROC_PER_NODE` and others.
        always: Whether to use torchrun for a single process too.

    Returns:
        None if this process can run the command itself: it is the only process, or one of several
        that are already running.

    Raises:
        LaunchError: If the environment describes an impossible set of processes.
    """
    if "RANK" in environ:
        return None
    processes = Processes.from_environ(environ)
    if not processes.several and not always:
        return None
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={processes.nnodes}",
        f"--node_rank={processes.node_rank}",
        f"--nproc_per_node={processes.nproc_per_node}",
        f"--master_addr={processes.addr}",
        f"--master_port={processes.port or _free_port()}",
        *runner,
    ]


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a child, with the programs of this interpreter first on PATH.

    DeepSpeed calls `ninja` by name to build extensions, and must find the one of its environment.
    """
    programs = str(Path(sys.executable).parent)
    path = environ.get("PATH", "")
    if path.split(os.pathsep)[0] == programs:
        return dict(environ)
    return {**environ, "PATH": os.pathsep.join(filter(None, (programs, path)))}


def run_child(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a command, forwards signals to it, and returns its exit code.

    The child runs in its own session, so that it receives a signal exactly once, whether the signal
    comes from the terminal or was sent to this process only. It ends when this process is killed.
    """
    process = subprocess.Popen(
        command, env=dict(environ), start_new_session=True, preexec_fn=die_with_parent()
    )

    def forward(number: int, _frame: object) -> None:
        _signal_group(process.pid, number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = {
        number: signal.signal(number, forward)
        for number in _FORWARDED_SIGNALS
        # Ignored signals stay ignored: under nohup, a closed terminal must not end the training.
        if in_main_thread and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _signal_group(process.pid, signal.SIGTERM)  # processes that the child left behind
    return code if code >= 0 else 128 - code


def report_outcome(outcome: Path, code: int) -> int:
    """Prints why a training failed, or how many samples it skipped, and returns the exit code.

    Args:
        outcome: File that the training wrote, see `OUTCOME_VARIABLE`.
        code: Exit code of the child. torchrun exits with 1, whatever its processes' exit codes.
    """
    recorded = json.loads(outcome.read_text(encoding="utf-8"))
    if code:
        if "error" not in recorded:
            return code
        click.echo(f"Error: {recorded['error']}", err=True)
        return int(recorded["code"]) if code == EXIT_FAILED else code
    skip_log = SkipLog(recorded["skip_log"])
    count = len(skip_log.read())
    if not count:
        return 0
    noun = "sample was" if count == 1 else "samples were"
    click.echo(f"Training finished, but {count} {noun} skipped: see {skip_log.path}", err=True)
    return EXIT_SKIPPED


def _take_option(arguments: list[str], name: str) -> str | None:
    """Removes an option, as `--name value` or `--name=value`, and returns its value."""
    for index, word in enumerate(arguments):
        if word.startswith(f"{name}="):
            del arguments[index]
            return word.partition("=")[2]
        if word == name:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
            del arguments[index : index + 2]
            return value or "(nothing)"
    return None


def _launcher(arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(prog="xtuner-add", add_help=False, allow_abbrev=False)
    parser.add_argument("--launcher")
    return parser.parse_known_args(arguments)[0].launcher


def _read_int(environ: Mapping[str, str], name: str, default: int, at_least: int) -> int:
    text = environ.get(name) or str(default)
    try:
        number = int(text)
    except ValueError:
        number = at_least - 1
    if number < at_least:
        raise LaunchError(f"{name}={text!r} must be a whole number of at least {at_least}")
    return number


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:  # the group has already ended
        return


def die_with_parent() -> Callable[[], None] | None:
    """Returns a `preexec_fn` that makes the kernel terminate the child when its parent dies."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork; afterwards only the call itself is safe
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
