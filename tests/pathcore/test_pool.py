"""A worker that dies fails its task only."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pathcore import pool
from pathcore.pool import WorkerDiedError, run_tasks

CHOOSE_CONTEXT = pool._context  # before a fixture of all tests replaces it

pytestmark = pytest.mark.multiproc


MODULE = """
import os, signal
from multiprocessing.connection import Connection

from pathcore import pool
from pathcore.pool import run_tasks


def work(task):
    if task == 3:
        os.abort()  # as a C library does
    if task == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 7:
        os._exit(9)
    return 2 * task


def die_sending(task):
    if task == 1:
        def half(connection, content):
            os.write(connection.fileno(), bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = half
    return task


def nested(task):
    return sorted(run_tasks(work, [task, task + 1], workers=2))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Functions that spawned workers can import; they do not know the folder of the tests."""
    (tmp_path / "pool_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pool_functions", raising=False)
    return importlib.import_module("pool_functions")


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_dead_worker_costs_its_task(
    workers: int, start_method: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context(start_method)
    monkeypatch.setattr("pathcore.pool._context", lambda: context)
    deaths: dict[int, str] = {}

    def on_death(task: int, error: WorkerDiedError) -> list[int]:
        deaths[task] = str(error)
        return [100] if task == 5 else []

    numbers = range(12) if start_method == "fork" else range(2, 6)
    results = list(run_tasks(module.work, numbers, workers=workers, on_death=on_death))
    assert sorted(results) == sorted([2 * n for n in numbers if n not in (3, 5, 7)] + [200])
    assert "killed by SIGABRT" in deaths[3]
    assert "killed by SIGKILL, perhaps because the machine ran out of memory" in deaths[5]
    assert start_method == "spawn" or "exit code 9" in deaths[7]


def test_a_worker_that_dies_while_idle_costs_no_task(module: Any) -> None:
    """The pool waits for a task to come, kills its idle worker, and hands the task to a new one."""

    def tasks() -> Any:
        yield 10
        yield 20  # drawn when 10 is done; the worker is idle at this moment
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        yield 30

    deaths: list[int] = []
    found = run_tasks(
        module.work, tasks(), workers=1, on_death=lambda task, error: deaths.append(task) or ()
    )
    assert sorted(found) == [20, 40, 60] and not deaths


def test_a_process_with_threads_does_not_fork() -> None:
    """A lock that another thread holds at the fork would stay locked in the worker for ever."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert CHOOSE_CONTEXT().get_start_method() == "spawn"
    finally:
        done.set()
        thread.join()


def test_a_process_that_has_used_ray_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's native threads and signal handlers outlive it."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert CHOOSE_CONTEXT().get_start_method() == "spawn"
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert CHOOSE_CONTEXT().get_start_method() == "fork"


def test_without_a_handler_the_run_ends(module: Any) -> None:
    with pytest.raises(WorkerDiedError, match="killed by SIGABRT; run the same command again"):
        list(run_tasks(module.work, [3], workers=1))


class OddError(Exception):
    """Cannot be unpickled: its arguments are not those of `__init__`."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def fail(task: int) -> int:
    if task == 1:
        raise OddError("this", "that")
    time.sleep(0.05)
    return task


def test_an_exception_keeps_its_traceback_and_lets_others_finish() -> None:
    results: list[int] = []
    with pytest.raises(RuntimeError, match="OddError: this and that") as raised:
        for result in run_tasks(fail, [0, 1, 2, 3, 4], workers=2):
            results.append(result)
    assert "in fail" in str(raised.value.__cause__)
    assert 0 in results and len(results) < 4


def test_tasks_are_drawn_as_they_are_needed_and_workers_end(module: Any) -> None:
    drawn: list[int] = []

    def tasks() -> Any:
        for number in range(1000):
            drawn.append(number)
            yield number + 8

    results = run_tasks(module.work, tasks(), workers=2)
    assert next(results) >= 16
    results.close()  # type: ignore[attr-defined]
    assert len(drawn) < 10
    assert not multiprocessing.active_children()


def test_a_worker_may_have_workers(module: Any) -> None:
    found = sorted(run_tasks(module.nested, [10, 20], workers=2))
    assert found == [[20, 22], [40, 42]]


def test_a_worker_that_dies_while_sending_its_result_costs_its_task(module: Any) -> None:
    deaths: list[tuple[int, str]] = []

    def on_death(task: int, error: WorkerDiedError) -> list[int]:
        deaths.append((task, str(error)))
        return []

    results = run_tasks(module.die_sending, range(4), workers=2, on_death=on_death)
    assert sorted(results) == [0, 2, 3]
    assert [task for task, _ in deaths] == [1] and "SIGKILL" in deaths[0][1]


def make_function(task: int) -> Any:
    return lambda: task


def test_a_result_that_cannot_be_pickled_is_no_dead_worker() -> None:
    with pytest.raises(TypeError, match="result of a task, of type function, cannot be pickled"):
        list(run_tasks(make_function, [1], on_death=lambda task, error: []))


def test_large_results_and_tasks_do_not_block() -> None:
    tasks = [bytes(3_000_000) for _ in range(6)]
    assert [len(r) for r in run_tasks(bytes.swapcase, tasks, workers=2)] == [3_000_000] * 6


def wait_for(path: Path) -> bool:
    path.touch()
    return True


def test_functions_that_cannot_be_pickled_run_inline() -> None:
    seen: list[int] = []
    assert list(run_tasks(seen.append, [1, 2], engine="inline")) == [None, None]
    assert seen == [1, 2], "in this process"


def test_no_more_workers_than_tasks(tmp_path: Path) -> None:
    assert list(run_tasks(wait_for, [tmp_path / "a"], workers=8)) == [True]
    with pytest.raises(ValueError, match="workers: expected at least 1, found 0"):
        list(run_tasks(wait_for, [tmp_path], workers=0))
    with pytest.raises(ValueError, match="engine 'dask': expected one of process, ray, inline"):
        list(run_tasks(wait_for, [tmp_path], engine="dask"))  # type: ignore[arg-type]
