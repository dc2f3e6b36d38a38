"""Schedules: their shapes, and what is refused."""

import pytest

from es_jax.optim.schedules import largest, make_schedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("constant::2", [0.5, 1, 1, 1]),
        ("linear", [0.75, 0.5, 0.25, 0]),
        ("linear:0.2", [0.8, 0.6, 0.4, 0.2]),
        ("linear:2", [1.25, 1.5, 1.75, 2]),
        ("cosine:0:2", [0.5, 1, 0.5, 0]),
        ("cosine:0.5", [0.9268, 0.75, 0.5732, 0.5]),
    ],
)
def test_factors_of_four_steps(text, expected):
    factor = make_schedule(text, 4)
    assert [factor(step) for step in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-4)
    assert max(expected) <= largest(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("liner", "did you mean 'linear'"),
        ("linear:0:1:2", "write it as shape:end:warmup"),
        ("linear:a", "end must be a number"),
        ("linear:0:1.5", "whole number of steps"),
        ("linear:-1", "neither end nor warmup negative"),
        ("cosine:inf", "must be finite"),
        ("constant:0.5", "constant has no end"),
        ("linear:0:4", "warms up for 4 of 4 steps"),
    ],
)
def test_what_is_no_schedule_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(text, 4)
