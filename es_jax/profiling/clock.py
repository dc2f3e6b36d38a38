"""Measures where an iteration's time goes. A separate thread waits for the programs, so that the loop is not
delayed."""

import contextlib
import contextvars
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax

Seconds = dict[str, float]  # by name
_active: contextvars.ContextVar["Clock | None"] = contextvars.ContextVar("clock", default=None)


def timed(name: str, outputs: Any) -> Any:
    """Returns the outputs of a program unchanged; the active clock times the program under that name."""
    if clock := _active.get():
        # a program's outputs come together; with several, those of the last
        last = min(reversed(jax.tree.leaves(outputs)), key=lambda leaf: leaf.nbytes)
        clock.programs.put((name, time.monotonic(), last))
    return outputs


@contextlib.contextmanager
def host(name: str) -> Iterator[None]:
    """Times work of the host, while programs run on the devices."""
    began = time.monotonic()
    try:
        yield
    finally:
        if clock := _active.get():
            clock.add(name, time.monotonic() - began)


class Clock:
    """Seconds by name since `restart`, of device programs in sequence, and of work on the host.

    A program's time runs from the return of its launch, or from the end of the previous program if that is later, until
    its outputs are ready on all devices. So it includes neither compiling nor what a CPU runs within the launch.

    >>> import jax.numpy as jnp
    >>> with Clock() as clock:
    ...     _ = timed("square", jnp.square(jnp.ones(3)))
    ...     sorted(clock.seconds())
    ['square']
    """

    def __init__(self) -> None:
        self.programs: queue.Queue[tuple[str, float, Any] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._seconds: Seconds = defaultdict(float)

    def __enter__(self) -> "Clock":
        self._token = _active.set(self)
        threading.Thread(target=self._follow, name="es_jax clock", daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        _active.reset(self._token)
        self.programs.put(None)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] += seconds

    def restart(self) -> None:
        """Discard all times so far."""
        self.seconds()
        self._seconds.clear()

    def seconds(self) -> Seconds:
        """Seconds by name, after all launched programs have ended."""
        self.programs.join()
        with self._lock:
            return dict(self._seconds)

    def _follow(self) -> None:
        ended = 0.0
        for name, began, output in iter(self.programs.get, None):
            with contextlib.suppress(Exception):  # a failed program raises in the thread that uses its outputs
                jax.block_until_ready(output)
            del output
            now = time.monotonic()
            self.add(name, now - max(began, ended))
            ended = now
            self.programs.task_done()
        self.programs.task_done()


def split(seconds: Seconds, *, total: float) -> Seconds:
    """A step's columns: seconds and share of each part, and of `wait`, the time without a running program.

    `decode` includes prefill, and `update` includes the estimate, since each is one program; `Profile` separates them.
    `grade` is on the host in parallel to the programs; the others add up to the step without it.
    """
    parts = {name: seconds.get(name, 0.0) for name in ("perturb", "decode", "update")}
    parts["wait"] = max(total - sum(parts.values()), 0.0)
    return columns({**parts, "grade": seconds.get("grade", 0.0)}, total)


def columns(parts: Seconds, total: float) -> Seconds:
    """Seconds of each part and their share of `total`, under their names in files."""
    seconds = {f"seconds_{name}": value for name, value in parts.items()}
    return seconds | {f"share_{name}": value / total for name, value in parts.items()}
