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

Seconds = dict[str, float]  # by name
_active: contextvars.ContextVar["Clock | None"] = contextvars.ContextVar("clock", default=None)


def timed(name: str, outputs: Any) -> Any:
    """The outputs of a program, unchanged; the clock in use times the program under that name."""
    if clock := _active.get():
        # a program's all come at once; of several, the last one's
        last = min(reversed(jax.tree.leaves(outputs)), key=lambda leaf: leaf.nbytes)
        clock.programs.put((name, time.monotonic(), last))
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
        """Forget what was timed so far."""
        self.seconds()
        self._seconds.clear()

    def seconds(self) -> Seconds:
        """Seconds by name, once all that was launched has ended."""
        self.programs.join()
        with self._lock:
            return dict(self._seconds)

    def _follow(self) -> None:
        ended = 0.0
        for name, began, output in iter(self.programs.get, None):
            with contextlib.suppress(Exception):  # a program that failed raises in the thread that uses its outputs
                jax.block_until_ready(output)
            del output
            now = time.monotonic()
            self.add(name, now - max(began, ended))
            ended = now
            self.programs.task_done()
        self.programs.task_done()


def split(seconds: Seconds, *, total: float) -> Seconds:
    """A step's columns: seconds and share of each part, and of `wait`, when no program ran.

    `decode` holds prefill too and `update` the estimate, since each is one program; `Profile` tells both apart. `grade`
    is the host's, beside the programs: the others add up to the step without it.
    """
    parts = {name: seconds.get(name, 0.0) for name in ("perturb", "decode", "update")}
    parts["wait"] = max(total - sum(parts.values()), 0.0)
    return columns({**parts, "grade": seconds.get("grade", 0.0)}, total)


def columns(parts: Seconds, total: float) -> Seconds:
    """Seconds of each part and their share of `total`, under the names that the files have."""
    seconds = {f"seconds_{name}": value for name, value in parts.items()}
    return seconds | {f"share_{name}": value / total for name, value in parts.items()}
