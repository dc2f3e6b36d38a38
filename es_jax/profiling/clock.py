"""Where an iteration's time goes, told without holding anything up, and what share of the chips' peaks it used.

Programs are launched and run behind the host's back. `launched` hands a program's outputs to a thread that blocks on
them in launch order and notes when each came; the loop's own thread waits for nothing it would not wait for anyway.
"""

import contextlib
import contextvars
import dataclasses
import json
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from es_jax.core.chips import find_chip
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import matrix_weights
from es_jax.profiling import trace

_active: contextvars.ContextVar["Clock | None"] = contextvars.ContextVar("clock", default=None)


def launched(name: str, outputs: Any) -> Any:
    """The outputs themselves, on their way: of a program that the clock in use is to time under that name."""
    clock = _active.get()
    if clock is not None:
        last = reversed(jax.tree.leaves(outputs))  # a program's all come at once; of several, the last one's
        clock.watch(name, min(last, key=lambda leaf: leaf.nbytes))
    return outputs


@contextlib.contextmanager
def host(name: str) -> Iterator[None]:
    """Time of the host's own, while programs run beside it."""
    began = time.monotonic()
    try:
        yield
    finally:
        clock = _active.get()
        if clock is not None:
            clock.add(name, time.monotonic() - began)


class Clock:
    """Seconds by name since `restart`: of device programs, one behind the other, and of work on the host.

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
    columns = {f"seconds_{name}": value for name, value in parts.items()}
    return columns | {f"share_{name}": value / total for name, value in parts.items()}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step's completions need at least, against the published peaks of the chips (`es_jax.core.chips`).

    Counted are the products of weights with tokens, 2 operations a weight and token: a shared prefix once for each
    model, the head once for each new token; attention is left out. Memory is read once for all weights at each model's
    prefill and at each decode step, and the steps are as few as `slots` rows at once allow. Both are lower bounds, so
    the utilisation is, too. `None` on a chip that is not in the table, such as a CPU.

    Attributes:
      model: whose weights.
      itemsize: bytes of a weight of a member.
      slots: rows that a member decodes at once.
      devices: that work.
    """

    model: TransformerConfig
    itemsize: int
    slots: int
    devices: int

    def utilisation(
        self, *, prefill: int, new: int, completions: int, models: int, seconds: float
    ) -> dict[str, float | None]:
        """Shares of the peaks: `prefill` and `new` tokens of all completions of a step, by so many different models,
        in the seconds of decoding. A completion's last token is not read on, so its layers are not computed."""
        chip = find_chip(jax.devices()[0].device_kind)
        if chip is None or not seconds:
            return {"flop_utilisation": None, "bandwidth_utilisation": None}
        layers, head = matrix_weights(self.model)
        flops = 2 * (layers * (prefill + new - completions) + head * new)
        steps = models + max(new - completions, 0) / self.slots
        memory = (layers + head) * self.itemsize * steps
        return {
            "flop_utilisation": flops / (seconds * self.devices * chip.flops),
            "bandwidth_utilisation": memory / (seconds * self.devices * chip.bandwidth),
        }


_COLUMNS = ("seconds", "prompt_tokens", "tokens", "seconds_grade")


class Profile:
    """A TensorBoard trace of the steps from `start` up to, not including, `stop`, and what it tells: profile.json.

    `last`: the run's last step, with which the trace ends at the latest.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path, *, last: int):
        self._steps, self._workdir, self._running, self._last = steps, workdir, False, last
        self._done: list[tuple[float, ...]] = []  # of each traced step: what _COLUMNS names

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """To be entered around a step."""
        if self._steps and not self._running and self._steps[0] <= step < self._steps[1]:
            jax.profiler.start_trace(str(self._workdir / "tb"))
            self._running = True
        return jax.profiler.StepTraceAnnotation("step", step_num=step)

    def done(self, step: int, spent: Mapping[str, Any], inside: Callable[[], Mapping[str, float]]) -> str | None:
        """A step has ended; `spent` has its seconds and tokens. Behind the last one of the trace: what it tells.

        `inside`: seconds of what is part of another program, so that no trace tells it; called by all processes.
        """
        if not self._running:
            return None
        self._done.append(tuple(spent[name] for name in _COLUMNS))
        if step < min(self._steps[1] - 1, self._last):
            return None
        self.close()
        within = inside()
        return self._told(step, within) if jax.process_index() == 0 else None

    def _told(self, step: int, within: Mapping[str, float]) -> str:
        """Writes profile.json: means of the traced steps, of the devices that this process sees."""
        count = len(self._done)
        total, prompt, new, grade = (sum(column) / count for column in zip(*self._done, strict=True))
        try:
            parts = trace.part_seconds(trace.newest(self._workdir / "tb"))
        except Exception as error:  # a format that is not known yet: no reason to end a run
            return f"the trace of steps {step - count + 1} to {step} could not be read: {error!r}"
        if not parts:
            return f"the trace of steps {step - count + 1} to {step} names none of the run's programs"
        parts = {part: value / count for part, value in parts.items()}
        parts["wait"] = max(total - sum(parts.values()), 0.0)
        parts |= {"grade": grade, **within}  # beside the devices' work, or inside of it: no parts of the sum
        row: dict[str, Any] = {"first": step - count + 1, "last": step, "seconds": total}
        row |= {f"seconds_{part}": value for part, value in parts.items()}
        row |= {f"share_{part}": value / total for part, value in parts.items()}
        row |= {"prompt_tokens": prompt, "tokens": new}
        for part, tokens in (("prefill", prompt), ("decode", new)):
            row[f"{part}_tokens_per_second"] = tokens / parts[part] if parts[part] else None
        (self._workdir / "profile.json").write_text(json.dumps(row, indent=2) + "\n")
        shares = ", ".join(f"{part} {value / total:.1%}" for part, value in parts.items())
        return f"steps {row['first']} to {step} traced, {total:.2f} s each: {shares}; profile.json"

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


@contextlib.contextmanager
def compilation_cache(folder: Path) -> Iterator[None]:
    """Compiled programs are kept in the folder and found there again, also where it was moved or copied to, unless the
    user has a cache already.

    What `JAX_COMPILATION_CACHE_DIR` or `jax_compilation_cache_dir` say is left as it is ("" is no cache at all). JAX
    writes programs that took more than `jax_persistent_cache_min_compile_time_secs` to compile, from process 0 alone.
    """
    from jax.experimental.compilation_cache import compilation_cache as cache

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        yield
        return
    cache.reset_cache()  # JAX looks for a cache once, at the first compilation
    inner = jax.config.jax_persistent_cache_enable_xla_caches  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their paths would be part of programs' keys
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_enable_xla_caches", inner)
        cache.reset_cache()
