"""Runs a function over many tasks: here, in processes, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal, TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")
Engine = Literal["process", "ray"]

_WAITING_PER_WORKER = 2
"""Tasks handed out ahead; more would only hold memory."""

_RAY_STORE_BYTES = 128 << 20


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A progress bar with rate and time left, and without tqdm's thread.

    That thread watches for bars that stand still; with it about, processes could not be forked.
    """

    monitor_interval = 0


class WorkerDiedError(RuntimeError):
    """A worker process ended without an answer: killed, or out of memory."""


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    engine: Engine = "process",
    address: str | None = None,
    gpus_per_task: float = 0,
) -> Iterator[Result]:
    """Applies a function of a module to tasks, in any order.

    Tasks are drawn as they are needed. An exception ends the run; other tasks under way are
    finished first.

    Args:
        function: Takes a task; both and the result can be pickled.
        tasks: The tasks.
        workers: How many run at a time; 1 runs in this process.
        engine: `process`, or `ray`.
        address: Of a Ray cluster; None starts one on this machine.
        gpus_per_task: GPUs that Ray is to set aside for each task. Processes are not forked then:
            a forked one cannot use a GPU that this one has looked at.

    Yields:
        Results as they arrive.

    Raises:
        WorkerDiedError: A worker process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers: at least 1 expected, got {workers}")
    if address and engine != "ray":
        raise ValueError(f"--address {address}: only Ray has one; add --engine ray")
    if engine == "ray":
        yield from _run_on_ray(function, tasks, workers, address, gpus_per_task)
    elif workers == 1:
        yield from map(function, tasks)
    else:
        yield from _run_in_processes(function, tasks, workers, can_fork=not gpus_per_task)


def _run_in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, *, can_fork: bool
) -> Iterator[Result]:
    queue = iter(tasks)
    context = _context() if can_fork else multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    pending: set[Future[Result]] = set()
    try:
        while True:
            ahead = workers * _WAITING_PER_WORKER - len(pending)
            pending |= {pool.submit(function, task) for task in islice(queue, ahead)}
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            "a worker process was killed, perhaps for want of memory; run the same command again "
            "to continue, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> multiprocessing.context.BaseContext:
    # Forked workers have everything imported; with other threads about, a fork could deadlock.
    can_fork = sys.platform == "linux" and threading.active_count() == 1
    return multiprocessing.get_context("fork" if can_fork else "spawn")


def _end_with_parent() -> None:
    """Ends this worker when the process that started it is gone, be it by kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_on_ray(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    address: str | None,
    gpus_per_task: float,
) -> Iterator[Result]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray: install it with `pip install xtuner-add[ray]`") from error
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": workers, "object_store_memory": _RAY_STORE_BYTES}
        options["include_dashboard"] = False
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(**options)
    resources: dict[str, Any] = {}
    if gpus_per_task:  # workers stay alive, with the model that they have loaded
        resources = {"num_gpus": gpus_per_task, "max_calls": 0}
    remote = ray.remote(max_retries=3, **resources)(function)
    queue = iter(tasks)
    pending: list[Any] = []
    try:
        while True:
            ahead = workers * _WAITING_PER_WORKER - len(pending)
            pending += [remote.remote(task) for task in islice(queue, ahead)]
            if not pending:
                return
            done, pending = ray.wait(pending)
            for reference in done:
                yield _ray_result(ray, reference)
    finally:
        for reference in pending:
            ray.cancel(reference)
        if started_here:
            ray.shutdown()


def _ray_result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.WorkerCrashedError as error:
        raise WorkerDiedError(
            f"a Ray worker died; run the same command again to continue ({error})"
        ) from error
