"""Scores from worker processes, for a task whose grader is slow or may block. Workers import the task's modules, and no
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
    """What `workers_of` gives without processes."""

    def submit(example: Example, completion: str) -> Callable[[], Score]:
        try:
            score = as_score(task.score(example, completion))
        except Exception as error:
            raise _failed(task, example, f"{type(error).__name__}: {error}") from error
        return lambda: score

    return submit


@contextlib.contextmanager
def workers_of(task: Scorer, timeout_seconds: float | None = None) -> Iterator[Submit]:
    """As many processes as the task's `workers` says, at least one where there is a timeout, until the context ends.

    What it gives takes an example and a completion, and returns the function that waits for the score; without
    processes it scores at once.

    Args:
      timeout_seconds: the most that a score may take; None: what the task's own `timeout_seconds` says.

    Raises:
      ValueError: `workers` is not a whole number ≥ 0, the timeout is not above 0, or the task cannot be sent to a
        process; of the function that scores or waits: the score raised, took too long, or its process ended. The
        example is named.
    """
    count, limit = getattr(task, "workers", 0), timeout_seconds or getattr(task, "timeout_seconds", None)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"task {name_of(task)!r} has workers {count!r}: set it to a whole number, 0 for no processes")
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

    threads = ThreadPoolExecutor(count)  # each waits for a process
    try:
        yield lambda example, completion: threads.submit(scored, example, completion).result
    finally:
        for worker in workers:
            worker.end()
        threads.shutdown(cancel_futures=True)


def _failed(task: Scorer, example: Example, reason: str) -> ValueError:
    return ValueError(f"task {name_of(task)!r} could not score example {example.id!r}: {reason}")


class _Worker:
    """A process that scores, one completion after the other."""

    def __init__(self, task: bytes):
        context = multiprocessing.get_context("spawn")  # a fork would copy JAX's locks as they are
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, dict(outside.loaded), task))
        self._process.start()
        other.close()
        self._begun = False

    def score(self, example: Example, completion: str, limit: float | None) -> Score:
        """The score. Raises RuntimeError where there is none, with the reason."""
        try:
            if not self._begun:  # importing takes its time
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
                f"it took longer than task.timeout_seconds = {limit:g}: mend the task's score, or raise the timeout"
            )
        right, content = self._connection.recv()
        if not right:
            raise RuntimeError(content)
        return content

    def end(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, files: Mapping[str, tuple[str, bytes]], content: bytes) -> None:
    """A worker's work: scores of what comes, until nobody asks any more. Its first answer says that it can."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which may go to all processes: the run's own ends it, once it has
        signal.signal(number, signal.SIG_IGN)  # its last step's scores
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
        return pickle.loads(content)  # what the run itself has written

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
