"""Countdown's examples: made here, and read from rows."""

import re
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest

from es_jax.tasks import Example, get_task


@pytest.fixture(scope="module")
def problems() -> dict[str, list[Example]]:
    task = get_task("countdown")
    return {"train": task.train(), "test": task.test(800)}


def numbers_of(examples: list[Example]) -> set[tuple[int, ...]]:
    return {tuple(sorted(example.meta["numbers"])) for example in examples}


def finished(text: str) -> str:
    return f"done</think>\n<answer>{text}</answer>"


def test_default_counts(problems: dict[str, list[Example]]) -> None:
    assert len(problems["train"]) == 200
    assert len(get_task("countdown").test()) == 2000


def test_every_problem_is_solvable_and_well_formed(problems: dict[str, list[Example]]) -> None:
    task = get_task("countdown", grader="strict")
    for examples in problems.values():
        for example in examples:
            assert task.score(example, finished(example.answer)).reward == 1.1
            assert all(1 <= number <= 99 for number in example.meta["numbers"])
            assert 10 <= int(example.meta["target"]) <= 100
            assert [message["role"] for message in example.prompt] == ["system", "user", "assistant"]
            assert example.prompt[-1]["content"].endswith("<think>")
            user = example.prompt[1]["content"]
            assert ", ".join(map(str, example.meta["numbers"])) in user and example.meta["target"] in user


def test_no_problem_twice(problems: dict[str, list[Example]]) -> None:
    for examples in problems.values():
        assert len({example.id for example in examples}) == len(examples)
        problems = {(*sorted(example.meta["numbers"]), example.meta["target"]) for example in examples}
        assert len(problems) == len(examples)


def test_splits_are_disjoint_whatever_the_seed(problems: dict[str, list[Example]]) -> None:
    other = get_task("countdown", seed=1)
    train = numbers_of(problems["train"]) | numbers_of(other.train())
    test = numbers_of(problems["test"]) | numbers_of(other.test(200))
    assert not train & test


def test_seeded_and_independent_of_n(problems: dict[str, list[Example]]) -> None:
    assert get_task("countdown").train(20) == problems["train"][:20]
    assert get_task("countdown", seed=1).train(20) != problems["train"][:20]
    first = problems["train"][0]  # the same on every machine and version
    assert (first.id, first.meta["numbers"], first.meta["target"]) == ("train-0", (64, 43, 6), "27")


def test_distribution_is_that_of_the_real_rows(problems: dict[str, list[Example]]) -> None:
    examples = problems["train"] + problems["test"]
    by_count = {count: [e for e in examples if len(e.meta["numbers"]) == count] for count in (3, 4)}
    assert len(by_count[3]) / len(examples) == pytest.approx(0.49, abs=0.05)
    for count, division, sums in ((3, 0.17, 0.70), (4, 0.41, 0.34)):  # measured on the 2200 rows
        group = by_count[count]
        assert sum("/" in e.answer for e in group) / len(group) == pytest.approx(division, abs=0.08)
        assert sum(map(needs_only_sums, group)) / len(group) == pytest.approx(sums, abs=0.08)
    targets = [int(example.meta["target"]) for example in examples]
    assert sum(target < 55 for target in targets) / len(targets) == pytest.approx(0.5, abs=0.05)


def needs_only_sums(example: Example) -> bool:
    numbers, target = example.meta["numbers"], int(example.meta["target"])
    signs = product((1, -1), repeat=len(numbers))
    return any(sum(s * n for s, n in zip(row, numbers, strict=True)) == target for row in signs)


@pytest.mark.unchecked
@pytest.mark.parametrize("n", [0, -3, 2.0, True, "5"])
def test_bad_n(n: object) -> None:
    with pytest.raises(ValueError, match=r"n is .*: ask for at least 1 example"):
        get_task("countdown").train(n)


def test_real_rows(countdown_rows: Path) -> None:
    """2166 of the 2200 recorded solutions score 1.1; 19 rows have none, 15 do not use each number once."""
    task = get_task("countdown", data_dir=countdown_rows)
    examples = task.train() + task.test()
    assert (len(task.train()), len(examples)) == (200, 2200)
    solved = [e for e in examples if e.answer is not None]
    fair = [e for e in solved if sorted(map(int, re.findall(r"\d+", e.answer))) == sorted(e.meta["numbers"])]
    assert (len(solved), len(fair)) == (2181, 2166)
    assert {task.score(e, finished(e.answer)).reward for e in fair} == {1.1}
    assert {task.score(e, finished(e.answer)).reward for e in solved if e not in fair} == {0.1}
    assert sum(Fraction(e.meta["target"]).denominator > 1 for e in examples) == 43
    assert task.train(3) == examples[:3] and examples[0].id == "0"


def test_more_than_the_real_rows(countdown_rows: Path) -> None:
    with pytest.raises(ValueError, match=r"n is 201, but .*train\.parquet has 200 examples"):
        get_task("countdown", data_dir=countdown_rows).train(201)
