"""Where an iteration's time goes. A thread of its own waits for the programs, so that the loop is not held up."""

import contextlib
import contextvars
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax

_active: contextvars.ContextVar["Clock | None"] = contextvars.ContextVar("clock", default=None)


def timed(name: str, outputs: Any) -> Any:
    """The outputs of a program, unchanged; the clock in use times the program under that name."""
    if clock := _active.get():
        # a program's all come at once; of several, the last one's
        clock.watch(name, min(reversed(jax.tree.leaves(outputs)), key=lambda leaf: leaf.nbytes))
    return outputs


@contextlib.contextmanager
def host(name: str) -> Iterator[None]:
    """Times what the host itself does, while programs run beside it."""
    began = time.monotonic()
    try:
        yield
    finally:
        if clock := _active.get():
            clock.add(name, time.monotonic() - began)


class Clock:
    """Seconds by name since `restart`: of device programs, one after the other, and of work on the host.

    A program counts from the return of its launch, or from the end of the one before it where that came later, until
    its outputs are there on all devices. So neither compiling nor what a CPU runs within the launch is its time.

    >>> import jax.numpy as jnp
    >>> with Clock() as clock:
    ...     _ = timed("square", jnp.square(jnp.ones(3)))
    ...     sorted(clock.seconds())
    ['square']
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, float, Any] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)

    def __enter__(self) -> "Clock":
        self._token = _active.set(self)
        threading.Thread(target=self._follow, name="es_jax clock", daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        _active.reset(self._token)
        self._queue.put(None)

    def watch(self, name: str, output: Any) -> None:
        self._queue.put((name, time.monotonic(), output))

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] += seconds

    def restart(self) -> None:
        """Forget what was timed so far."""
        self.seconds()
        self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        """Seconds by name, once all that was launched has ended."""
        self._queue.join()
        with self._lock:
            return dict(self._seconds)

    def _follow(self) -> None:
        ended = 0.0
        for name, began, output in iter(self._queue.get, None):
            with contextlib.suppress(Exception):  # a program that failed raises in the thread that uses its outputs
                jax.block_until_ready(output)
            del output
            now = time.monotonic()
            self.add(name, now - max(began, ended))
            ended = now
            self._queue.task_done()
        self._queue.task_done()


def split(seconds: dict[str, float], *, total: float) -> dict[str, float]:
    """A step's columns: seconds and share of each part, and of `wait`, when no program ran.

    `decode` holds prefill too and `update` the estimate, since each is one program; `Profile` tells both apart. `grade`
    is the host's, beside the programs: the others add up to the step without it.
    """
    parts = {name: seconds.get(name, 0.0) for name in ("perturb", "decode", "update")}
    wait = max(total - sum(parts.values()), 0.0)
    return columns({**parts, "wait": wait, "grade": seconds.get("grade", 0.0)}, total)


def columns(parts: dict[str, float], total: float) -> dict[str, float]:
    """Seconds of each part and their share of `total`, under the names that the files have."""
    seconds = {f"seconds_{name}": value for name, value in parts.items()}
    return seconds | {f"share_{name}": value / total for name, value in parts.items()}
