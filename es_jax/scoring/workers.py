"""Scores from worker processes, for a task whose grader is slow. Workers import the task's modules, and no JAX."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

from es_jax.tasks.task import Example, Score, Scorer

Submit = Callable[[Example, str], Callable[[], Score]]


def at_once(task: Scorer) -> Submit:
    """What `workers_of` gives without processes."""

    def submit(example: Example, completion: str) -> Callable[[], Score]:
        score = task.score(example, completion)
        return lambda: score

    return submit


@contextlib.contextmanager
def workers_of(task: Scorer) -> Iterator[Submit]:
    """As many processes as the task's `workers` says, until the context ends.

    What it gives takes an example and a completion, and returns the function that waits for the score; without
    processes it scores at once.

    Raises:
      ValueError: `workers` is not a whole number ≥ 0.
      RuntimeError: of the function that waits: the score raised, or its process died; the example is named.
    """
    count = getattr(task, "workers", 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"task {task.name!r} has workers {count!r}: set it to a whole number, 0 for no processes")
    if not count:
        yield at_once(task)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's locks as they are
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(task,))
    for _ in range(count):  # the pool starts a process when there is work, and that takes a second
        pool.submit(os.getpid)

    def submit(example: Example, completion: str) -> Callable[[], Score]:
        with _named(task, example):  # here, once another of the pool's processes has died
            future = pool.submit(_score, example, completion)

        def result() -> Score:
            with _named(task, example):
                return future.result()

        return result

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _named(task: Scorer, example: Example) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"task {task.name!r} could not score example {example.id!r}: {error!r}") from error


_task: Scorer | None = None  # a worker's


def _begin(task: Scorer) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's own process ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _score(example: Example, completion: str) -> Score:
    assert _task is not None
    return _task.score(example, completion)
