"""Schedules of α, σ and λ, written as short texts: the factor of each at every step."""

import math
from collections.abc import Callable

import optax

from es_jax.core.names import unknown

SHAPES = ("constant", "linear", "cosine")


def make_schedule(text: str, steps: int) -> Callable[[int], float]:
    """The factor at step t = 1..T of "shape", "shape:end" or "shape:end:warmup".

    Over the first `warmup` steps (0 by default) the factor rises as t/warmup to 1. From there to the last step it goes
    to `end` (0 by default) along a line or half a cosine. "constant" stays at 1 and takes no end. Examples: "constant",
    "linear:0.1", "cosine:0:20", "constant::20". Raises ValueError that says what is wrong with the text.

    >>> [round(make_schedule("linear:0:2", 4)(t), 2) for t in (1, 2, 3, 4)]
    [0.5, 1.0, 0.5, 0.0]
    """
    shape, end, warmup = parse(text)
    if warmup and warmup >= steps:
        raise ValueError(f"schedule {text!r} warms up for {warmup} of {steps} steps: it must be fewer")
    rest = max(steps - warmup, 1)
    tail = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, end, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=end),
    }[shape]
    return lambda step: step / warmup if step <= warmup else float(tail(step - warmup))


def parse(text: str) -> tuple[str, float, int]:
    """(shape, end, warmup) of a schedule's text. Raises ValueError that says what is wrong with it."""
    shape, *rest = text.split(":")
    if shape not in SHAPES:
        raise ValueError(unknown("schedule", shape, SHAPES))
    if len(rest) > 2:
        raise ValueError(f"schedule {text!r} has {len(rest) + 1} parts: write it as shape:end:warmup")
    end, warmup = [*rest, "", ""][:2]
    if shape == "constant" and end:
        raise ValueError(f"schedule {text!r}: constant has no end; leave it out, as in constant::{warmup or 20}")
    try:
        last, steps = float(end or 0), int(warmup or 0)
    except ValueError:
        raise ValueError(f"schedule {text!r}: end must be a number and warmup a whole number of steps") from None
    if not 0 <= last < math.inf or steps < 0:
        raise ValueError(f"schedule {text!r}: end must be finite, and neither end nor warmup negative")
    return shape, last, steps


def largest(text: str) -> float:
    """The largest factor of the schedule."""
    return max(1.0, parse(text)[1])
