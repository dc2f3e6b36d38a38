"""The arithmetic parser against Python's own, on text made here, and the search for expressions."""

import random
import warnings
from fractions import Fraction

import pytest

from es_jax.tasks.arithmetic import parse, solve


def python_value(text: str) -> float | None:
    """What Python makes of text drawn from a harmless alphabet; None if it is not a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = eval(text.strip())
        except (SyntaxError, TypeError, ZeroDivisionError):
            return None
    return value if isinstance(value, int | float) else None


def test_parses_what_python_parses() -> None:
    rng = random.Random(0)
    numbers = 0
    for _ in range(20_000):
        text = "".join(rng.choices("123456+-*/() ", k=rng.randint(1, 9)))
        if "**" in text or "//" in text:
            assert parse(text) is None, text
            continue
        ours, expected = parse(text), python_value(text)
        assert (ours is None) == (expected is None), text
        if ours is not None:
            assert float(ours.value) == pytest.approx(expected), text
            numbers += 1
    assert numbers > 500


def test_is_exact() -> None:
    expression = parse("(1 / 3 + 1 / 3 + 1 / 3 - 1) / 99")
    assert expression is not None and expression.value == 0
    assert expression.numbers == (1, 3, 1, 3, 1, 3, 1, 99)
    assert parse("2 - 3 - 4").value == -5
    assert parse("24 / 4 / 3").value == 2
    assert parse("1 + 2 * 3 / 4").value == Fraction(5, 2)


@pytest.mark.parametrize(
    ("numbers", "target"),
    [
        ((7,), 7),
        ((3, 4), 12),
        ((77, 12, 76, 49), 56),
        ((3, 3, 8, 8), 24),
        ((1, 5, 5, 5), 24),
        ((1, 1, 1, 1, 1), 5),
    ],
)
def test_solve_finds_what_exists(numbers: tuple[int, ...], target: int) -> None:
    (text,) = solve([numbers], target)
    expression = parse(text)
    assert expression.value == target and sorted(expression.numbers) == sorted(numbers)


@pytest.mark.parametrize(("numbers", "target"), [((7,), 8), ((5, 5), 3), ((1, 1, 1, 1), 24), ((5, 5, 0), 3)])
def test_solve_finds_nothing_where_nothing_is(numbers: tuple[int, ...], target: int) -> None:
    assert solve([numbers], target) == [None]
