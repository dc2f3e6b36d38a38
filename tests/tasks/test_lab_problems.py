"""The laboratory's problems: how many there are, and that the draws of a seed stay what they are."""

import hashlib
from itertools import permutations, product

import pytest

from es_jax.tasks import get_task
from es_jax.tasks.lab import KINDS, Lab, split_of

TWO = [str(i) for i in range(10, 100)]
FIVE = ["".join(digits) for digits in product("0123456789", repeat=5)]


def _countdown() -> list[tuple[str, str]]:
    problems = set()
    for digits in product(range(1, 10), repeat=3):
        values = [a + x * b + y * c for a, b, c in permutations(digits) for x in (1, -1) for y in (1, -1)]
        text = "".join(map(str, digits))
        problems |= {(f"K{text}:{value}=", f"{sorted(digits)} {value}") for value in values if value >= 0}
    return sorted(problems)


PROBLEMS = {  # kind: every (problem, key), written out here without the task's draws
    "countdown": _countdown(),
    "add": [(f"A{a}+{b}=", f"{min(a, b)} {max(a, b)}") for a in TWO for b in TWO],
    "subtract": [(f"S{a}-{b}=", f"{a} {b}") for a in TWO for b in TWO if b <= a],
    **{
        kind: [(f"{letter}{x}=", x) for x in FIVE]
        for kind, letter in zip(("reverse", "sort", "maximum"), "ROM", strict=True)
    },
    "compare": [(f"C{a}<{b}=", f"{a} {b}") for a in TWO for b in TWO],
    "count": [(f"N{which}:{x}=", f"{which} {x}") for which in "0123456789" for x in FIVE],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_problems(kind: str) -> None:
    splits = [split_of(kind, key) for _, key in PROBLEMS[kind]]
    assert (KINDS[kind].train, KINDS[kind].test) == (splits.count("train"), splits.count("test"))


@pytest.mark.parametrize("kind", ["countdown", "add", "subtract", "compare"])
def test_all_problems_can_be_drawn(kind: str) -> None:
    task = Lab(kind)
    for split, most in (("train", KINDS[kind].train), ("test", KINDS[kind].test)):
        examples = getattr(task, split)(most)
        assert {e.id for e in examples} == {name for name, key in PROBLEMS[kind] if split_of(kind, key) == split}
        assert getattr(task, split)(7) == examples[:7]


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_are_is_refused_at_once(kind: str) -> None:
    task, most = get_task(f"lab-{kind}"), KINDS[kind].test
    with pytest.raises(
        ValueError, match=rf"n is 500000, but lab-{kind} has {most} test problems: ask for at most {most}"
    ):
        task.test(500_000)
    with pytest.raises(ValueError, match=rf"n is {KINDS[kind].train + 1}, but lab-{kind} has"):
        task.train(KINDS[kind].train + 1)


DRAWN = {  # kind: digest of the problems and answers of train() and test()
    "countdown": "a85021995e8cbc36",
    "add": "3d1b37acb0c10954",
    "subtract": "d9497671f91fd443",
    "reverse": "7e94f1d45fc8e90b",
    "sort": "e5b4f6e668de7aae",
    "maximum": "be24c33dfac7fa54",
    "compare": "103218756a214d0c",
    "count": "af87cfd5605a51e7",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_seed_stay_the_same(kind: str) -> None:
    """Else results at one seed could not be compared with those of an earlier version."""
    rows = [(example.id, example.answer) for example in [*Lab(kind).train(), *Lab(kind).test()]]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == DRAWN[kind]
