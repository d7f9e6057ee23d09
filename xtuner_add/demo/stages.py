"""Stages of a demo: each runs once, is recorded with its inputs, and resumes after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypeVar

import click
from tqdm import tqdm

from pathcore.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_SKIPPED
from pathcore.files import FolderInUseError, folder_lock, sha256_of, write_json
from xtuner_add.launch import die_with_parent

MANIFEST = "manifest.json"
_LOCK = ".demo.lock"
# MMEngine's log, and open_clip's.
_PROGRESS = re.compile(
    r"(?:Iter|Epoch)\(train\)\s+(?:\[(\d+)\])?\[\s*(\d+)/(\d+)\]"
    r"|Train Epoch: (\d+) \[\s*(\d+)/(\d+) \("
)
_TAIL_LINES = 30
_LIVE_ROW = 2  # below the bars of two stages side by side
_FINISHED_S = 1.0
"""Minimum duration of a round; a shorter one was already finished by an earlier run."""
_COMMAND = (sys.executable, "-m", "xtuner_add.cli")
_running: set[subprocess.Popen[str]] = set()
_stop = threading.Event()
_MAX_THREADS = 4  # matrices this small do not use more

Job = TypeVar("Job")
Drawn = TypeVar("Drawn")


class StageError(RuntimeError):
    """Raised if a stage fails; the message ends with its last output."""


@dataclass(frozen=True)
class Stage:
    """One step of a demo.

    Attributes:
        name: Name, also the key in the manifest.
        run: Function that does the work in the demo's folder.
        outputs: Paths relative to that folder that exist when the stage is done.
        settings: JSON values on which the result depends, in addition to earlier stages.
        owned: Folders that are cleared before a run with other settings.
    """

    name: str
    run: Callable[[], None]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any]
    owned: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoStages:
    """The stages of a demo.

    Attributes:
        work_dir: Absolute path of the demo's folder.
        plan: Sizes of the demo.
        seed: Seed of the data, the trainings and the draws.
    """

    work_dir: Path
    plan: Any
    seed: int

    def rounds(self) -> list[list[Stage]]:
        """Returns the stages in order; those of one round run side by side."""
        raise NotImplementedError

    def log(self, name: str) -> Path:
        """Returns the log file of this name for the output of commands."""
        return self.work_dir / "logs" / f"{name}.log"


def run_demo(
    demo: DemoStages,
    summarise: Callable[[Path], dict[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    write_report: Callable[[Path, Mapping[str, Any]], Path],
    expected: Mapping[str, float],
    *,
    quick: bool,
) -> dict[str, Any]:
    """Runs the stages that are not done yet, writes summary and report, and prints the results.

    Args:
        demo: The stages.
        summarise: Returns the figures for `summary.json`.
        table: Returns the summary as text for a terminal.
        write_report: Writes `report.html` and returns its path.
        expected: Seconds of each stage in an earlier run; their proportions and the pace of this
            run give the time left.
        quick: Whether the plan is tiny, to see that every stage works; the time left is unknown.

    Returns:
        The content of `summary.json`.

    Raises:
        StageError: If a stage fails, or the folder holds something else.
    """
    work_dir, rounds = demo.work_dir, demo.rounds()
    with only_run_in(work_dir):
        names = [[stage.name for stage in stages] for stages in rounds]
        clock = Clock(names, {} if quick else expected)
        manifest = Manifest(work_dir)
        before: list[str] = []
        for stages in rounds:
            click.echo(clock.begin())
            with _live(clock.line):
                manifest.run_all(stages, before)
            before += [stage.name for stage in stages]
        summary = summarise(work_dir)
        seconds = summary["stage_seconds"] = manifest.seconds()
        # Stages of one round run side by side; interrupted runs count too.
        longest = [max(seconds[stage.name] for stage in stages) for stages in rounds]
        summary |= {"seconds": round(sum(longest), 1), "seed": demo.seed, "quick": quick}
        write_json(work_dir / "summary.json", summary)
        report = write_report(work_dir, summary)
        click.echo(table(summary))
        click.echo(f"{_minutes(clock.elapsed)}  {report}")
    return summary


class Clock:
    """Shows which round of a demo is running, the elapsed time, and the expected time left.

    Args:
        rounds: Names of the stages of each round.
        expected: Seconds of each stage on some machine.
        now: Returns the time in seconds.
    """

    def __init__(
        self,
        rounds: Sequence[Sequence[str]],
        expected: Mapping[str, float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = [" and ".join(names) for names in rounds]
        self._expected = [max(expected.get(name, 0.0) for name in names) for names in rounds]
        self._now = now
        self._begun: list[float] = []
        self._start = now()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    @property
    def left(self) -> float | None:
        """Returns the expected remaining seconds; None without expected times."""
        if not any(self._expected):
            return None
        ran = len(self._begun) - 1
        spent = [end - begin for begin, end in zip(self._begun, self._begun[1:], strict=False)]
        # Rounds finished by an earlier run take no time and do not indicate the pace.
        rounds = zip(spent, self._expected, strict=False)
        pairs = [(s, e) for s, e in rounds if s > _FINISHED_S and e]
        pace = sum(s for s, _ in pairs) / sum(e for _, e in pairs) if pairs else 1.0
        here = pace * self._expected[ran] - (self._now() - self._begun[-1])
        return max(0.0, here) + pace * sum(self._expected[ran + 1 :])

    def begin(self) -> str:
        """Begins the next round; returns its line."""
        self._begun.append(self._now())
        return self.line()

    def line(self) -> str:
        """Returns number and names of the round, the time so far and the time left."""
        number = len(self._begun)
        text = f"{_minutes(self.elapsed)}  {number}/{len(self._names)} {self._names[number - 1]}"
        if self.left is None:
            return text
        about = "about" if all(self._expected[number - 1 :]) else "more than"
        return f"{text}; {about} {_minutes(self.left).strip()} left"


@contextmanager
def _live(line: Callable[[], str]) -> Iterator[None]:
    """Updates a line under the progress bars every second, if there is a terminal."""
    over = threading.Event()
    # A separate descriptor, because `call_command` redirects the others to its log.
    with os.fdopen(os.dup(2), "w") as terminal, tqdm(
        bar_format="{desc}", position=_LIVE_ROW, leave=False, disable=None, file=terminal
    ) as bar:  # fmt: skip

        def renew() -> None:
            while not over.wait(1):
                bar.set_description_str(line())

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def code_digests(*modules: ModuleType) -> dict[str, str]:
    """Returns the digest of each module, for the settings of a stage that it determines."""
    return {module.__name__: sha256_of(Path(str(module.__file__))) for module in modules}


class Manifest:
    """Records which stages of a folder are done, with what settings, and how long they took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / MANIFEST
        self._rows: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # stages run side by side
        if self._file.is_file():
            self._rows = json.loads(self._file.read_text(encoding="utf-8"))

    def run(self, stage: Stage, before: Sequence[str]) -> None:
        """Runs a stage unless it is done with these settings after these stages.

        Args:
            stage: The stage.
            before: Names of the stages whose results it uses.

        Raises:
            StageError: If the stage fails.
        """
        digest = self._digest(stage, before)
        row = dict(self._rows.get(stage.name, {}))
        if row.get("digest") == digest and row.get("done") and self._has(stage.outputs):
            return
        if row.get("digest") != digest:
            for name in stage.owned:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            row = {"digest": digest, "seconds": 0.0}
        self._note(stage.name, row | {"done": False})
        start = time.monotonic()
        try:
            stage.run()
        finally:
            row["seconds"] += time.monotonic() - start
            self._note(stage.name, row | {"done": False})
        if not self._has(stage.outputs):
            raise StageError(f"{stage.name}: ended without {', '.join(stage.outputs)}")
        self._note(stage.name, row | {"done": True})

    def run_all(self, stages: Sequence[Stage], before: Sequence[str]) -> None:
        """Runs stages side by side, one core each; a single one in this thread.

        Args:
            stages: The stages.
            before: Names of the stages whose results they use.

        Raises:
            StageError: If one of them fails; the others are stopped.
        """
        if len(stages) == 1:
            self.run(stages[0], before)
            return
        with ThreadPoolExecutor(len(stages)) as pool:
            done = [pool.submit(self.run, stage, before) for stage in stages]
            try:
                for outcome in as_completed(done):
                    outcome.result()
            except BaseException:
                stop_all()  # a stage failed or the user interrupted: stop the others
                raise

    def seconds(self) -> dict[str, float]:
        """Returns the seconds that each stage took, failed attempts included."""
        return {name: round(row["seconds"], 1) for name, row in self._rows.items()}

    def _has(self, outputs: Sequence[str]) -> bool:
        return all((self.folder / name).exists() for name in outputs)

    def _digest(self, stage: Stage, before: Sequence[str]) -> str:
        inputs = {
            "settings": stage.settings,
            "before": [self._rows.get(name, {}).get("digest") for name in before],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _note(self, name: str, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows[name] = row
            write_json(self._file, self._rows)


def run_command(arguments: Sequence[object], folder: Path, log: Path, title: str, row: int) -> None:
    """Runs an `xtuner-add` command in a process of its own, with a progress bar.

    Args:
        arguments: Arguments of `xtuner-add`.
        folder: Working directory.
        log: File to which the output is appended.
        title: Title of the progress bar.
        row: Line of the progress bar, for commands side by side.

    Raises:
        StageError: If the command fails.
    """
    command = [*_COMMAND, *map(str, arguments)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",  # otherwise progress bars stand still for a minute at a time
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    bar = tqdm(desc=title, position=row, leave=False, unit="step")
    with log.open("a", encoding="utf-8", buffering=1) as stream:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent(),  # or a killed demo would keep training
        )
        _running.add(process)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                stream.write(line)
                tail.append(line)
                _show_progress(bar, line)
            code = process.wait()
        finally:
            _running.discard(process)
            process.terminate()  # nothing to do unless this process was interrupted
            bar.close()
    if code not in (0, EXIT_SKIPPED):
        raise StageError(f"{title}: exit code {code}; all of its output: {log}\n{''.join(tail)}")


def call_command(
    arguments: Sequence[object], folder: Path, log: Path, *, may_skip: bool = False
) -> None:
    """Runs an `xtuner-add` command in this process, so that libraries are imported only once.

    Args:
        arguments: Arguments of `xtuner-add`.
        folder: Working directory.
        log: File to which the command line and the output are appended.
        may_skip: Whether the command may skip rows or slides.

    Raises:
        StageError: If the command fails.
    """
    words = [str(argument) for argument in arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    with log.open("a+", encoding="utf-8", buffering=1) as stream:
        start = stream.seek(0, os.SEEK_END)
        stream.write(f"$ xtuner-add {shlex.join(words)}\n")
        os.chdir(folder)  # paths are relative, so that the log shows what can be typed there
        try:
            code = _call(words, stream)
        finally:
            os.chdir(before)
        stream.seek(start)
        tail = "".join(stream.readlines()[-_TAIL_LINES:])
    if code != EXIT_OK and not (may_skip and code == EXIT_SKIPPED):
        raise StageError(
            f"xtuner-add {words[0]}: exit code {code}; all of its output: {log}\n{tail}"
        )


def _call(words: list[str], stream: TextIO) -> int:
    from xtuner_add.cli import main

    with redirect_stdout(stream), redirect_stderr(stream), _descriptors_to(stream):
        try:
            # Without a click error the value is the exit code of `ctx.exit`, or None.
            return main.main(words, prog_name="xtuner-add", standalone_mode=False) or EXIT_OK
        except click.ClickException as error:
            error.show(stream)
            return error.exit_code
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else EXIT_FAILED


@contextmanager
def _descriptors_to(stream: TextIO) -> Iterator[None]:
    """Sends what child processes print to the log too."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        for descriptor in kept:
            os.dup2(stream.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def stop_all() -> None:
    """Terminates the running commands, and asks other work to stop."""
    _stop.set()
    for process in list(_running):
        process.terminate()


def stopped() -> bool:
    """Returns whether another stage failed or the user stopped the run."""
    return _stop.is_set()


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Creates a folder, or takes one that a demo made, and locks it.

    Raises:
        StageError: If another run holds the lock, or the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Stages clear folders with names such as `data`: those must be the demo's own.
    if not any((folder / name).is_file() for name in (MANIFEST, _LOCK)) and any(folder.iterdir()):
        raise StageError(
            f"{folder}: holds other files, and no {MANIFEST} of a demo; name a new folder"
        )
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(folder / _LOCK))
        except FolderInUseError as error:
            raise StageError(str(error)) from error
        _stop.clear()
        yield


def threads() -> int:
    """Returns the threads for each of two stages side by side; more would wait for each other."""
    return max(1, min(_MAX_THREADS, (os.cpu_count() or 2) // 2))


def _show_progress(bar: Any, line: str) -> None:
    found = _PROGRESS.search(line)
    if found is None:
        return
    epoch, step, total = found.groups()[:3] if found[2] else found.groups()[3:]
    bar.total = int(total)
    if epoch is not None:
        bar.set_postfix_str(f"epoch {epoch}", refresh=False)
    bar.n = int(step)
    bar.refresh()


def draw_all(
    draw: Callable[[Job], Drawn], jobs: Sequence[Job], workers: int = 2
) -> Iterable[Drawn]:
    """Draws slides in several processes and yields the results in order."""
    # spawn: a fork of a process that has run torch can hang.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_use_one_thread) as pool:
        yield from tqdm(pool.map(draw, jobs, chunksize=4), "slides", len(jobs), leave=False)


def _use_one_thread() -> None:
    """Limits BLAS to one thread, because the worker processes already fill the cores."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines whole."""
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _minutes(duration: float) -> str:
    minutes, seconds = divmod(int(duration), 60)
    return f"{minutes:2d}:{seconds:02d}"
