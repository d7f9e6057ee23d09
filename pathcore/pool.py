"""Runs a function on many tasks, in worker processes or on a Ray cluster.

If a worker dies, because it ran out of memory or a C library aborted, only its current task is
lost. Even a single worker is therefore a separate process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Literal, TypedDict, TypeVar, get_args

from tqdm import tqdm

from pathcore.extras import says_extra
from pathcore.garbage import collect_as_usual

Task = TypeVar("Task")
Result = TypeVar("Result")
Engine = Literal["process", "ray", "inline"]

_RAY_WAITING_PER_WORKER = 2
"""Number of tasks per worker that are submitted in advance, to hide Ray's scheduling latency."""

_RAY_STORE_BYTES = 128 << 20  # Ray would take 30 % of the memory; results are small
_READY = b"ready"


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar without tqdm's monitor thread.

    A process with several threads must not fork, since a lock that another thread holds at that
    moment would stay locked in the child forever.
    """

    monitor_interval = 0


class WorkerDiedError(RuntimeError):
    """Raised if a worker process ends without returning a result."""


class _RemoteError(Exception):
    """Carries the traceback of a worker, as the cause of the exception it raised."""


class PoolOptions(TypedDict, total=False):
    """Keyword arguments of `run_tasks` that jobs pass on: how tasks are distributed.

    Attributes:
        workers: Number of worker processes, by default one.
        engine: `process` or `ray`; or `inline`, which runs all tasks in the calling process, for
            functions that cannot be pickled.
        address: Address of a Ray cluster, all of whose machines must see the files of the job; by
            default Ray is started on this machine.
        gpus_per_task: Number of GPUs that Ray reserves for each task.
        can_fork: Whether worker processes may be forked, which starts them at once. A forked
            process cannot use CUDA if its parent has initialised it.
    """

    workers: int
    engine: Engine
    address: str | None
    gpus_per_task: float
    can_fork: bool


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int = 1,
    engine: Engine = "process",
    address: str | None = None,
    gpus_per_task: float = 0,
    can_fork: bool = True,
    on_death: Callable[[Task, WorkerDiedError], Iterable[Task]] | None = None,
) -> Iterator[Result]:
    """Applies a function to tasks and yields results in the order in which they are completed.

    Tasks are taken from `tasks` as workers become idle. If the function raises, running tasks are
    completed before the exception is raised here.

    Args:
        function: Function of a task. Function, tasks and results must be picklable.
        tasks: The tasks.
        workers: See `PoolOptions`, as for the next four.
        engine: `process`, `ray` or `inline`.
        address: Address of a Ray cluster.
        gpus_per_task: Number of GPUs per task.
        can_fork: Whether processes may be forked.
        on_death: Function that is called with the task of a worker that died, and returns tasks to
            run instead. By default the death of a worker ends the run.

    Raises:
        WorkerDiedError: If a worker dies before its first task, or during a task and `on_death` is
            not given.
        ValueError: If the arguments contradict each other.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, found {workers}")
    if engine not in get_args(Engine):
        raise ValueError(f"engine {engine!r}: expected one of {', '.join(get_args(Engine))}")
    if address and engine != "ray":
        raise ValueError(f"address {address}: only Ray takes one; add --engine ray (engine='ray')")
    on_death = on_death or _raise_death
    collect_as_usual()
    if engine == "inline":
        yield from map(function, tasks)
    elif engine == "ray":
        yield from _run_on_ray(function, tasks, workers, address, gpus_per_task, on_death)
    else:
        context = _context() if can_fork else multiprocessing.get_context("spawn")
        yield from _run_in_processes(function, tasks, workers, context, on_death)


def _raise_death(task: object, error: WorkerDiedError) -> Iterable[Any]:
    raise WorkerDiedError(
        f"{error}; run the same command again to continue, with fewer workers if memory is short"
    )


def _context() -> BaseContext:
    # A forked worker starts immediately, with all modules imported. But locks of other threads stay
    # locked in it forever. This includes the thread pool of OpenMP, which `threading` does not see
    # and which torch uses unless it is limited to one thread. Ray leaves native threads and signal
    # handlers behind when it ends; workers forked after that died of SIGSEGV.
    torch = sys.modules.get("torch")
    single = threading.active_count() == 1 and (torch is None or torch.get_num_threads() == 1)
    can_fork = sys.platform == "linux" and single and "ray" not in sys.modules
    return multiprocessing.get_context("fork" if can_fork else "spawn")


@dataclass
class _Worker(Generic[Task]):
    """A worker process; `task` is a list of at most one element, since a task may be None."""

    process: BaseProcess
    connection: Connection
    ready: bool
    task: list[Task]


def _run_in_processes(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    context: BaseContext,
    on_death: Callable[[Task, WorkerDiedError], Iterable[Task]],
) -> Iterator[Result]:
    queue, again = iter(tasks), deque[Task]()
    crew: list[_Worker[Task]] = []
    failure: Exception | None = None

    def hand_out() -> None:
        """Gives a task to every idle worker; starts workers while there are more tasks."""
        while failure is None:
            idle = next((w for w in crew if w.ready and not w.task), None)
            starting = sum(not worker.ready for worker in crew)
            if idle is None and (starting or len(crew) == workers):
                return
            # The next task is fetched before a worker is started, so that there are never more
            # workers than tasks.
            if not again:
                again.extend(islice(queue, 1))
            if not again:
                return
            if idle is None:
                crew.append(_start(context, function))
                return
            try:
                idle.connection.send((again[0],))
            except (BrokenPipeError, ConnectionResetError):
                crew.remove(idle)  # it died while idle, so this task is not to blame
                continue
            idle.task.append(again.popleft())

    try:
        while True:
            hand_out()
            awaited = [worker for worker in crew if worker.task or not worker.ready]
            if not awaited:
                if failure is not None:
                    raise failure
                return
            wait([w.connection for w in awaited] + [w.process.sentinel for w in awaited])
            results: list[Result] = []
            for worker in awaited:
                if not worker.connection.poll() and worker.process.is_alive():
                    continue
                try:
                    sent = worker.connection.recv_bytes() if worker.connection.poll() else None
                except (EOFError, OSError):  # OSError if it died while sending its result
                    sent = None
                if sent is None:
                    crew.remove(worker)
                    error = _death_of(worker.process)
                    if not worker.ready:
                        raise WorkerDiedError(
                            f"worker processes do not start; see above for the reason ({error})"
                        )
                    again.extendleft(reversed(list(on_death(worker.task[0], error))))
                elif not worker.ready:
                    worker.ready = True
                else:
                    succeeded, content = pickle.loads(sent)
                    worker.task.clear()
                    if succeeded:
                        results.append(content)
                    else:
                        failure = failure or content
                hand_out()  # before results are yielded, since their consumer may be slow
            yield from results
    finally:
        for worker in crew:
            if worker.task or not worker.ready:
                worker.process.kill()
            else:  # closing the pipe is not enough, since workers forked later hold copies of it
                with contextlib.suppress(BrokenPipeError):
                    worker.connection.send(None)
        for worker in crew:
            worker.process.join()
            worker.connection.close()


def _start(context: BaseContext, function: Callable[[Task], Result]) -> _Worker[Task]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function))  # type: ignore[attr-defined]
    process.start()
    theirs.close()  # so that the pipe breaks when the worker dies
    return _Worker(process, ours, False, [])


def _death_of(process: BaseProcess) -> WorkerDiedError:
    process.join()
    code = process.exitcode or 0
    if code < 0:
        cause = f"it was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            cause += ", perhaps because the machine ran out of memory"
    else:
        cause = f"it ended with exit code {code}"
    return WorkerDiedError(f"a worker process died: {cause}")


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Main loop of a worker: processes tasks until the parent sends None."""
    # Ctrl-C reaches the whole process group; the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    connection.send_bytes(_READY)
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        if message is None:
            return
        try:
            answer = _pickled_result(function(message[0]))
        except Exception as error:
            answer = ForkingPickler.dumps((False, _portable(error)))
        connection.send_bytes(answer)


def _pickled_result(result: object) -> Any:
    try:
        return ForkingPickler.dumps((True, result))
    except Exception as error:  # pickling may raise anything
        kind = type(result).__name__
        raise TypeError(
            f"the result of a task, of type {kind}, cannot be pickled to leave its worker process: "
            f"{error}; return plain data"
        ) from error


def _portable(error: Exception) -> Exception:
    """Returns an exception that survives pickling and shows the worker's traceback."""
    remote = _RemoteError("\n" + traceback.format_exc())
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # pickling or unpickling an exception may raise anything
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.__cause__ = remote
    return _WithCause(copy, remote)


class _WithCause(Exception):
    """Pickles as another exception together with its cause, which pickling would drop."""

    def __init__(self, error: Exception, cause: Exception) -> None:
        super().__init__()
        self.error, self.cause = error, cause

    def __reduce__(self) -> Any:
        return _restore, (self.error, self.cause)


def _restore(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def _end_with_parent() -> None:
    """Ends this worker when its parent ends, even if the parent is killed by SIGKILL."""
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
    on_death: Callable[[Task, WorkerDiedError], Iterable[Task]],
) -> Iterator[Result]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with says_extra("--engine ray", "ray"):
        import ray  # optional, and takes seconds
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": workers, "object_store_memory": _RAY_STORE_BYTES}
        options["include_dashboard"] = False
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(**options)
    resources: dict[str, Any] = {}
    if gpus_per_task:  # keeps workers alive, with the model they have loaded
        resources = {"num_gpus": gpus_per_task, "max_calls": 0}

    def call(task: Task) -> Result:  # Ray accepts functions only, not all callables
        return function(task)

    # One retry, because a node of the cluster may disappear. A task whose worker dies twice is
    # blamed itself.
    remote = ray.remote(max_retries=1, **resources)(call)
    queue, again = iter(tasks), deque[Task]()
    pending: dict[Any, Task] = {}
    try:
        while True:
            ahead = workers * _RAY_WAITING_PER_WORKER - len(pending)
            again.extend(islice(queue, max(0, ahead - len(again))))
            for _ in range(min(ahead, len(again))):
                task = again.popleft()
                pending[remote.remote(task)] = task
            if not pending:
                return
            done, _ = ray.wait(list(pending))
            for reference in done:
                task = pending.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except (
                    ray.exceptions.WorkerCrashedError,
                    ray.exceptions.OutOfMemoryError,
                    ray.exceptions.NodeDiedError,
                ) as error:
                    death = WorkerDiedError(f"a Ray worker died: {error}")
                    again.extendleft(reversed(list(on_death(task, death))))
                    continue
                yield result
    finally:
        for reference in pending:
            ray.cancel(reference)
        if started_here:
            ray.shutdown()
