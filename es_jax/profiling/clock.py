"""Where an iteration's time goes, measured without holding anything up.

Programs run while the host does other things. `launched` hands a program's outputs to a thread that blocks on them in
launch order and notes when each came; the loop's own thread waits for nothing that it would not wait for anyway.
"""

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


def launched(name: str, outputs: Any) -> Any:
    """The outputs of a program, on their way, as they are given; the clock in use times it under that name."""
    if clock := _active.get():
        last = reversed(jax.tree.leaves(outputs))  # a program's all come at once; of several, the last one's
        clock.watch(name, min(last, key=lambda leaf: leaf.nbytes))
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
    its outputs are there; so neither compiling nor what a CPU runs within the launch, as it does small programs, is its
    time. With several devices it ends with the last of them.

    >>> import jax.numpy as jnp
    >>> with Clock() as clock:
    ...     _ = launched("square", jnp.square(jnp.ones(3)))
    ...     sorted(clock.seconds())
    ['square']
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[str, float, Any] | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._pending, self._ended = 0, 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._thread = threading.Thread(target=self._follow, name="es_jax clock", daemon=True)

    def __enter__(self) -> "Clock":
        self._token = _active.set(self)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        _active.reset(self._token)
        self._queue.put(None)

    def watch(self, name: str, output: jax.Array) -> None:
        with self._idle:
            self._pending += 1
        self._queue.put((name, time.monotonic(), output))

    def add(self, name: str, seconds: float) -> None:
        with self._idle:
            self._seconds[name] += seconds

    def restart(self) -> None:
        """Forget what was timed so far."""
        self.seconds()
        self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        """Seconds by name, once all that was launched has ended."""
        with self._idle:
            self._idle.wait_for(lambda: not self._pending)
            return dict(self._seconds)

    def _follow(self) -> None:
        while (item := self._queue.get()) is not None:
            name, began, output = item
            with contextlib.suppress(Exception):  # a program that failed raises in the thread that uses its outputs
                jax.block_until_ready(output)
            del item, output
            now = time.monotonic()
            with self._idle:
                self._seconds[name] += now - max(began, self._ended)
                self._ended = now
                self._pending -= 1
                self._idle.notify_all()


def split(seconds: dict[str, float], *, total: float) -> dict[str, float]:
    """A step's columns: seconds and share of each part, and of `wait`, when no program ran.

    `decode` holds prefill too and `update` the estimate, since each is one program; `Profile` tells both apart. `grade`
    is the host's, beside the programs, so it is no part of the sum of the others, which is the step.
    """
    parts = {name: seconds.get(name, 0.0) for name in ("perturb", "decode", "update")}
    parts = {**parts, "wait": max(total - sum(parts.values()), 0.0), "grade": seconds.get("grade", 0.0)}
    return columns(parts, total)


def columns(parts: dict[str, float], total: float) -> dict[str, float]:
    """Seconds of each part and their share of `total`, under the names that the files have."""
    seconds = {f"seconds_{name}": value for name, value in parts.items()}
    return seconds | {f"share_{name}": value / total for name, value in parts.items()}
