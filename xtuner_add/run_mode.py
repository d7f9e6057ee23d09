"""Runs a mode of XTuner in this process: `python -m xtuner_add.run_mode train CONFIG ...`.

`xtuner_add.launch` starts it once per process of a run. It prepares the environment that XTuner and
MMEngine need before they are imported, and adapts the config to the machine.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from pathcore.deferred_imports import defer_imports
from pathcore.exit_codes import EXIT_FAILED, EXIT_USAGE
from pathcore.files import write_json
from xtuner_add.launch import DEBUG_VARIABLE, OUTCOME_VARIABLE, TRACKER_VARIABLE, TRACKERS
from xtuner_add.modes import MODES, Mode
from xtuner_add.paths import own_configs


def main(argv: Sequence[str]) -> None:
    """Runs the mode `argv[0]` with the arguments `argv[1:]`.

    Raises:
        ValueError: If there is no such mode.
    """
    if not argv or argv[0] not in MODES:
        raise ValueError(f"the first argument must be one of {', '.join(MODES)}, not {argv[:1]}")
    mode = MODES[argv[0]]

    defer_imports()  # before anything that imports a host
    if not os.environ.get(DEBUG_VARIABLE):
        from xtuner_add.console import shorten_console

        shorten_console()  # before the libraries that it quietens are imported
    from pallava.engine.runtime import prepare_host

    prepare_host()
    _announce_own_configs()
    sys.argv = [f"xtuner-add {mode.name}", *argv[1:]]
    with configs_fitted_to_machine() if mode.adapts_config else contextlib.nullcontext():
        if mode.name == "train" and not os.environ.get(DEBUG_VARIABLE):
            with _errors_in_one_line():
                _run_tool(mode)
        else:
            _run_tool(mode)
    if mode.name == "train":
        _write_outcome()


@contextlib.contextmanager
def configs_fitted_to_machine() -> Iterator[None]:
    """Adapts every config that is read in this context to the machine.

    XTuner reads its config in the middle of `main()`, which leaves no other point to intervene. It
    applies `--cfg-options` afterwards, so options on the command line override the adaptation.
    """
    from mmengine.config import Config

    from pallava.engine.runtime import adapt_config

    original = Config.fromfile

    def fromfile(*args: Any, **kwargs: Any) -> Any:
        cfg = adapt_config(original(*args, **kwargs))
        if name := os.environ.get(TRACKER_VARIABLE):
            cfg.visualizer = TRACKERS[name]
        return cfg

    Config.fromfile = staticmethod(fromfile)
    try:
        yield
    finally:
        Config.fromfile = staticmethod(original)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Reports errors that a user can fix in one line and ends the process.

    The exit code is 2 if the training has not begun, and 1 if it has. Other exceptions keep their
    traceback.
    """
    from pallava.engine.hooks import DivergedError

    try:
        yield
    except (ValueError, OSError, TypeError, LookupError, ImportError, AssertionError) as error:
        code = EXIT_FAILED if _had_begun(error) else EXIT_USAGE
        named = isinstance(error, ValueError | OSError)
        text = str(error) if named else f"{type(error).__name__}: {error}"
        _end_process(code, f"{text} (run again with --debug for the traceback)", error)
    except DivergedError as error:
        _end_process(EXIT_FAILED, str(error), error)


def _end_process(code: int, text: str, error: BaseException) -> NoReturn:
    if target := os.environ.get(OUTCOME_VARIABLE):
        # `launch` prints it. torchrun ends the other processes as soon as one has failed, so that
        # none can be relied on to print what all of them meet.
        write_json(target, {"code": code, "error": text})
    else:
        print(f"Error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code) from error


def _had_begun(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == "run_iter" for frame, _ in frames)


def _announce_own_configs() -> None:
    """Registers this project's configs with XTuner, which then finds them by name."""
    from xtuner.configs import cfgs_name_path

    cfgs_name_path.update({name: str(path) for name, path in own_configs().items()})


def _run_tool(mode: Mode) -> None:
    tool = importlib.import_module(mode.module)
    if hasattr(tool, "main"):
        tool.main()
    else:  # convert_refcoco is a script without main()
        runpy.run_module(mode.module, run_name="__main__")


def _write_outcome() -> None:
    target = os.environ.get(OUTCOME_VARIABLE)
    if target and os.environ.get("RANK", "0") == "0":
        from pallava.engine.skipping import default_skip_log

        write_json(target, {"skip_log": str(default_skip_log().path)})


if __name__ == "__main__":
    main(sys.argv[1:])
