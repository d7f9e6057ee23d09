"""Stages of a long job: run once, remembered by what went in, resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pathcore.exit_codes import EXIT_SKIPPED
from pathcore.files import write_json
from xtuner_add.launch import die_with_parent

MANIFEST = "manifest.json"
_LOCK = ".demo.lock"
# MMEngine's log, and open_clip's.
_PROGRESS = re.compile(
    r"(?:Iter|Epoch)\(train\)\s+(?:\[(\d+)\])?\[\s*(\d+)/(\d+)\]"
    r"|Train Epoch: (\d+) \[\s*(\d+)/(\d+) \("
)
_TAIL_LINES = 30
_COMMAND = (sys.executable, "-m", "xtuner_add.cli")
_running: set[subprocess.Popen[str]] = set()
_stop = threading.Event()
_MAX_THREADS = 4  # matrices this small do not fill more


class StageError(RuntimeError):
    """A stage that failed; the message ends with what it printed last."""


@dataclass(frozen=True)
class Stage:
    """One step of the job.

    Attributes:
        name: Also its key in the manifest.
        run: Does the work inside the job's folder.
        outputs: Paths relative to that folder that exist when the stage is done.
        settings: What the result depends on besides the stages before; JSON-like.
        owned: Folders to clear before a run with other settings.
    """

    name: str
    run: Callable[[], None]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any]
    owned: tuple[str, ...] = ()


class Manifest:
    """Which stages are done, with what settings, and how long they took.

    Args:
        folder: The job's folder.
    """

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
            StageError: The stage failed.
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
            before: See `run`.

        Raises:
            StageError: One of them failed; the others are stopped.
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
                stop_all()  # one stage failed, or the user had enough: the others need not go on
                raise

    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took, failed attempts included."""
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
    """Runs one `xtuner-add` command in a folder, its output in a log, its progress as a bar.

    Args:
        arguments: After `xtuner-add`.
        folder: Where it runs.
        log: Receives the output.
        title: Of the progress bar.
        row: Line of the progress bar, for commands side by side.

    Raises:
        StageError: The command failed.
    """
    command = [*_COMMAND, *map(str, arguments)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",  # else the bars stand still for a minute at a time
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
            preexec_fn=die_with_parent(),  # else a killed demo would go on training unseen
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


def stop_all() -> None:
    """Ends the commands that run at the moment, and asks other work to end itself."""
    _stop.set()
    for process in list(_running):
        process.terminate()


def stopped() -> bool:
    """Whether work should end because another stage failed or the user stopped the run."""
    return _stop.is_set()


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Makes a folder, or takes one that a demo made, and holds it for one run at a time.

    Raises:
        StageError: Another run holds it, or it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Stages clear folders with names such as `data`: those must be the demo's own.
    if not any((folder / name).is_file() for name in (MANIFEST, _LOCK)) and any(folder.iterdir()):
        raise StageError(
            f"{folder}: holds other files, and no {MANIFEST} of a demo; name a new folder"
        )
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(
                f"{folder}: another run works in this folder; wait for it, or choose another one"
            ) from error
        _stop.clear()
        yield


def threads() -> int:
    """Threads of each of two stages side by side: more would wait for each other."""
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
