"""Commands of `xtuner-add` called as a user types them, in this process or in one of their own.

In this process the libraries are imported once instead of a dozen times.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import click

from pathcore.exit_codes import EXIT_OK, EXIT_SKIPPED
from xtuner_add.demo.stages import StageError

_TAIL_CHARS = 1500


def call_command(
    arguments: Sequence[object], log: Path, folder: Path, *, may_skip: bool = False
) -> None:
    """Runs one command in this process, its output in a log.

    Args:
        arguments: After `xtuner-add`.
        log: Receives the command line and the output.
        folder: Where it runs.
        may_skip: Rows or slides that cannot be used are no failure.

    Raises:
        StageError: The command failed.
    """
    words = [str(argument) for argument in arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+", encoding="utf-8", buffering=1) as stream:
        start = stream.seek(0, 2)
        stream.write(f"$ xtuner-add {shlex.join(words)}\n")
        with _working_in(folder):
            code = _call(words, stream)
        stream.seek(start)
        said = stream.read()
    if code != EXIT_OK and not (may_skip and code == EXIT_SKIPPED):
        raise StageError(
            f"xtuner-add {words[0]}: exit code {code}; all of its output: {log}\n"
            f"{said[-_TAIL_CHARS:]}"
        )


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Paths are relative to the folder, so that the log shows what can be typed there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _descriptors_to(stream: TextIO) -> Iterator[None]:
    """What child processes print goes to the log too."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        for descriptor in kept:
            os.dup2(stream.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _call(words: list[str], stream: TextIO) -> int:
    from xtuner_add.cli import main

    with redirect_stdout(stream), redirect_stderr(stream), _descriptors_to(stream):
        try:
            # Without a click error the value is the exit code of `ctx.exit`, or None.
            return main.main(words, prog_name="xtuner-add", standalone_mode=False) or 0
        except click.ClickException as error:
            error.show(stream)
            return error.exit_code
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
