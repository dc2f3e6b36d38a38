"""Scores from worker processes, for a task whose grader is slow or may block. Workers import the task's modules but not
JAX."""

import contextlib
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from es_jax.tasks import outside
from es_jax.tasks.task import Example, Score, Scorer, as_score, name_of

Submit = Callable[[Example, str], Callable[[], Score]]


def at_once(task: Scorer) -> Submit:
    """The scorer that `workers_of` returns without worker processes."""

    def submit(example: Example, completion: str) -> Callable[[], Score]:
        try:
            score = as_score(task.score(example, completion))
        except Exception as error:
            raise _failed(task, example, f"{type(error).__name__}: {error}") from error
        return lambda: score

    return submit


@contextlib.contextmanager
def workers_of(task: Scorer, timeout_seconds: float | None = None) -> Iterator[Submit]:
    """Runs as many worker processes as the task's `workers` says, at least one if there is a timeout, until the context
    ends.

    It yields a function of an example and a completion, which returns a function that waits for the score. Without
    worker processes it scores at once.

    Args:
      timeout_seconds: the time limit for one score; None is the task's own `timeout_seconds`.

    Raises:
      ValueError: `workers` is not a whole number ≥ 0, the timeout is not above 0, or the task cannot be sent to a
        process. The functions that score or wait raise it, with the example's name, if the score raised, took too long,
        or its process ended.
    """
    count, limit = getattr(task, "workers", 0), timeout_seconds or getattr(task, "timeout_seconds", None)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(
            f"task {name_of(task)!r} has workers {count!r}: set it to a whole number from 0, where 0 is no worker "
            "processes"
        )
    if limit is not None and not (isinstance(limit, int | float) and 0 < limit < math.inf):
        raise ValueError(f"task {name_of(task)!r} has timeout_seconds {limit!r}: set it to a number above 0, or None")
    count = count or int(limit is not None)
    if not count:
        yield at_once(task)
        return
    try:
        content = pickle.dumps(task)
    except Exception as error:
        raise ValueError(
            f"task {name_of(task)!r} cannot be sent to a worker process ({error}): define its class at the top of a "
            "file, or leave out its workers and task.timeout_seconds"
        ) from error
    workers = [_Worker(content) for _ in range(count)]
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def scored(example: Example, completion: str) -> Score:
        worker = free.get()
        try:
            return worker.score(example, completion, limit)
        except Exception as error:
            raise _failed(task, example, str(error)) from error
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(count)  # each thread waits for a process
    try:
        yield lambda example, completion: threads.submit(scored, example, completion).result
    finally:
        for worker in workers:
            worker.end()
        threads.shutdown(cancel_futures=True)


def _failed(task: Scorer, example: Example, reason: str) -> ValueError:
    return ValueError(f"task {name_of(task)!r} could not score example {example.id!r}: {reason}")


class _Worker:
    """A process that scores one completion after another."""

    def __init__(self, task: bytes):
        context = multiprocessing.get_context("spawn")  # a fork would copy JAX's held locks
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, dict(outside.loaded), task))
        self._process.start()
        other.close()
        self._begun = False

    def score(self, example: Example, completion: str, limit: float | None) -> Score:
        """The score. Raises RuntimeError with the reason if there is none."""
        try:
            if not self._begun:  # importing takes some time
                self._receive(None)
                self._begun = True
            self._connection.send((example, completion))
            return self._receive(limit)
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"its worker process ended (exit code {self._process.exitcode})") from None

    def _receive(self, limit: float | None) -> Any:
        if not self._connection.poll(limit):
            self.end()
            raise RuntimeError(
                f"it took longer than task.timeout_seconds = {limit:g}: correct the task's score, or raise the timeout"
            )
        right, content = self._connection.recv()
        if not right:
            raise RuntimeError(content)
        return content

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, files: Mapping[str, tuple[str, bytes]], content: bytes) -> None:
    """A worker's loop: it scores requests until the pipe closes. Its first answer says that it is ready."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach all processes; the run ends this one when it is done
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer(make: Callable[[], Any]) -> Any:
        try:
            result = make()
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
            return None
        connection.send((True, result if isinstance(result, Score) else None))
        return result

    def begin() -> Scorer:
        for path, source in files.values():
            outside.load_file(Path(path), source)
        return pickle.loads(content)  # trusted: the run itself made it

    task = answer(begin)
    while task is not None:
        try:
            example, completion = connection.recv()
        except EOFError:
            return
        answer(lambda: as_score(task.score(example, completion)))  # noqa: B023


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
