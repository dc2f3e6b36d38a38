"""Countdown: reach a target from some numbers, each used exactly once, with + - * /.

The training task of the ES papers (arXiv 2509.24372, arXiv 2605.30148).
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from es_jax.tasks.arithmetic import Expression, parse, solve
from es_jax.tasks.robust import expressions
from es_jax.tasks.rows import (
    SHARD,
    FieldError,
    Hub,
    Row,
    candidates,
    check_field,
    checked,
    examples_of,
    hub_rows,
    read_split,
    verl_example,
)
from es_jax.tasks.task import (
    GRADERS,
    Example,
    Message,
    Score,
    Splits,
    all_views,
    check_count,
    check_known,
    last_block,
    messages,
    response_text,
)

TOLERANCE = Fraction(1, 100_000)
DECIMAL = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")
SYSTEM = "You solve number puzzles. Think a puzzle through first, and state your solution only afterwards."
USER = (
    "Your numbers are {numbers} and the target is {target}. Write one arithmetic expression whose value is the target. "
    "Every number has to appear in it exactly once; +, -, *, / and parentheses are allowed. Put your reasoning between "
    "<think> and </think>. On the line after it, put the expression and nothing else between <answer> and </answer>; "
    "with the numbers 3, 6, 8 and the target 30 that line would be <answer>(8 - 3) * 6</answer>."
)
OPENING = "I will try combinations until one works.\n<think>"


@dataclass(frozen=True)
class Countdown(Splits):
    """The Countdown task.

    Args:
      data_dir: folder with train and test rows. A row has `numbers` (whole, ≥ 0) and `target` (a decimal such as "98",
        "-3" or "27.4") in `extra_info` or in `reward_model.ground_truth` of the verl layout; or it has the columns
        `nums` and `target`, and the prompt is written here. None: problems are made here, 3 or 4 numbers in 1..99 and a
        whole target in 10..100 that can be reached; 200 for training and 2000 for testing unless `n` says otherwise,
        and no set of numbers is in both, whatever the seeds.
      hub: a data set on the hub, with rows as in `data_dir`. A data set with only a train split, such as
        Jiayi-Pan/Countdown-Tasks-3to4, is divided: the hash of a set of numbers decides whether it is for training or
        for testing. A copy of such a data set in a folder is divided in the same way.
      seed: of the problems made here; other seeds give other problems. The first n do not depend on n.
      grader: "paper", "strict" or "robust": the grader that decides `answer` in reward = answer + 0.1 · format;
        docs/grading.md has the rules, with examples.

    >>> task = Countdown()
    >>> example = Example("0", "", None, {"numbers": (44, 19, 35), "target": "98"})
    >>> task.score(example, "44 + 19 = 63</think>\\n<answer>44 + 19 + 35</answer>").reward
    1.1
    """

    data_dir: str | Path | None = None
    seed: int = 0
    grader: str = "paper"
    hub: str | None = None

    name: ClassVar[str] = "countdown"

    def __post_init__(self) -> None:
        check_known("grader", self.grader, GRADERS)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}: it should be a whole number")
        if self.hub is not None and self.data_dir is not None:
            raise ValueError(f"hub is {self.hub!r} and data_dir {str(self.data_dir)!r}: set only one of them")

    def _examples(self, split: str, n: int | None) -> list[Example]:
        if self.hub is not None:
            splits = hub_rows(Hub(self.hub), None)
            if split in splits and "test" in splits:
                return examples_of(splits[split], f"{self.hub}, split {split}", _example, n)
            return _divided(splits.get("train", ()), f"{self.hub}, split train", split, n)
        if self.data_dir is not None:
            if _is_copy(Path(self.data_dir)):
                return _divided(*read_split(self.data_dir, "train"), split, n)
            return examples_of(*read_split(self.data_dir, split), _example, n)
        default = 200 if split == "train" else 2000
        return list(islice(_problems(split, self.seed), default if n is None else check_count(n)))

    def extract_answer(self, example: Example, completion: str) -> str | None:
        """The value and the numbers of the expression that the published grader reads; expressions that it cannot
        distinguish are one answer."""
        expression = _published(last_block(response_text(example, completion)))
        return expression and f"{expression.value} from {', '.join(map(str, sorted(expression.numbers)))}"

    def score(self, example: Example, completion: str) -> Score:
        """Grades the assistant's whole turn: the opened turn in the prompt and the completion.

        Paper: the last <answer>…</answer> holds an expression (see `arithmetic.parse`) that uses each number exactly
        once and comes within 1e-5 of the target. Strict: and `format_score` is 1. Robust: `robust.expressions`.
        """
        response = response_text(example, completion)
        block = last_block(response)
        form = format_score(response, has_answer=block is not None)

        def right(expression: Expression | None) -> bool:
            return expression is not None and (
                sorted(expression.numbers) == sorted(example.meta["numbers"])
                and abs(expression.value - Fraction(example.meta["target"])) < TOLERANCE
            )

        paper = right(_published(block))
        robust = any(map(right, expressions(response)))
        return all_views(self.grader, paper=paper, strict=paper and form == 1.0, robust=robust, form=form)


def _published(block: str | None) -> Expression | None:
    """The expression that the published grader reads in an answer block."""
    return parse((block or "").removesuffix("\n"))


def format_score(response: str, *, has_answer: bool) -> float:
    """1.0 if the turn, with <think> in front, is a think block, a newline and an answer block, optionally followed by a
    newline; else 0.1 for a think block plus 0.5 for an answer block.

    >>> format_score("hm</think>\\n<answer>1</answer>", has_answer=True)
    1.0
    >>> format_score("hm</think> <answer>1</answer>", has_answer=True)
    0.6
    """
    if "</think>\n<answer>" in response and response.endswith(("</answer>", "</answer>\n")):
        return 1.0  # the two blocks cannot overlap; the <think> in front opens the block that </think> closes
    return 0.1 * ("</think>" in response) + 0.5 * has_answer


def _example(row: Row, number: int) -> Example:
    return verl_example(_verl(row), number, extra=_check_extra, needs_answer=False)


def _is_copy(folder: Path) -> bool:
    """Whether a folder is a copy of a hub data set that has only a train split."""
    train, test = (list(candidates(folder, split)) for split in ("train", "test"))
    return bool(train) and not test and all(SHARD.search(files[0].name) for files in train)


def _divided(rows: Iterable[Row], source: str, split: str, n: int | None) -> list[Example]:
    """The part of the rows for training, or for testing."""
    examples = checked(rows, source, _example)
    own = (example for example in examples if _split_of(example.meta["numbers"]) == split)
    part = islice(own, None if n is None else check_count(n))
    return examples_of(part, f"the {split} part of {source}", lambda example, number: example, n)


def _check_extra(extra: Row) -> Row:
    return {**extra, **_problem(extra.get("numbers"), extra.get("target"), "extra_info.numbers", "extra_info.target")}


def _problem(numbers: Any, target: Any, numbers_name: str, target_name: str) -> dict[str, Any]:
    whole = isinstance(numbers, list | tuple) and numbers and all(type(n) is int and n >= 0 for n in numbers)
    check_field(whole, numbers_name, numbers, "a list of at least one whole number ≥ 0")
    decimal = isinstance(target, str | int | float) and DECIMAL.fullmatch(str(target))
    check_field(decimal, target_name, target, "a decimal number such as '98' or '27.4'")
    return {"numbers": tuple(numbers), "target": str(target)}


def _verl(row: Row) -> Row:
    """A row with its problem in `extra_info`, and with a prompt if it had none."""
    model, extra = row.get("reward_model"), row.get("extra_info")
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    in_extra = isinstance(extra, Mapping) and any(extra.get(name) is not None for name in ("numbers", "target"))
    if row.get("prompt") is None:
        name = "numbers" if row.get("nums") is None and "numbers" in row else "nums"
        if name in row and "target" in row:
            problem = _problem(row[name], row["target"], name, "target")
            return {**row, "prompt": list(_prompt(**problem)), "extra_info": problem}
    elif isinstance(truth, Mapping) and isinstance(extra, Mapping | None):
        names = [f"reward_model.ground_truth.{name}" for name in ("numbers", "target")]
        problem = _problem(truth.get("numbers"), truth.get("target"), *names)
        if extra and in_extra:
            other = _check_extra(extra)
            same = sorted(other["numbers"]) == sorted(problem["numbers"])
            same = same and Fraction(other["target"]) == Fraction(problem["target"])
            check_field(
                same, "reward_model.ground_truth", truth, "the same as the problem in extra_info, from which it differs"
            )
        return {**row, "extra_info": {**(extra or {}), **problem}, "reward_model": None}
    elif in_extra or not isinstance(extra, Mapping | None):  # a wrong field is refused by its name
        return row
    raise FieldError(
        f"its columns are {', '.join(row) or 'none'}: a row must have `nums` and `target`; or `prompt`, and `numbers` "
        "and `target` in reward_model.ground_truth or in extra_info"
    )


def _prompt(numbers: tuple[int, ...], target: str) -> tuple[Message, ...]:
    user = USER.format(numbers=", ".join(map(str, numbers)), target=target)
    return messages(system=SYSTEM, user=user, assistant=OPENING)


def _problems(split: str, seed: int) -> Iterator[Example]:
    """An endless sequence of different problems. The hash of a set of numbers decides to which split it belongs."""
    rng = random.Random(f"countdown/{split}/{seed}")

    def draw(low: int, high: int) -> int:
        return low + int(rng.random() * (high - low + 1))  # the one method that Python keeps stable across versions

    seen: set[tuple[int, ...]] = set()
    while True:
        count, target = draw(3, 4), draw(10, 100)
        problem = None
        while problem is None:
            sets = [tuple(draw(1, 99) for _ in range(count)) for _ in range(16)]
            sets = [x for x in sets if _split_of(x) == split and (*sorted(x), target) not in seen]
            solutions = zip(sets, solve(sets, target), strict=True) if sets else ()
            problem = next(((numbers, text) for numbers, text in solutions if text is not None), None)
        numbers, equation = problem
        meta = {"numbers": numbers, "target": str(target)}
        yield Example(f"{split}-{len(seen)}", _prompt(numbers, str(target)), equation, meta)
        seen.add((*sorted(numbers), target))


def _split_of(numbers: tuple[int, ...]) -> str:
    return "train" if hashlib.sha256(repr(sorted(numbers)).encode()).digest()[0] < 128 else "test"
