"""The laboratory's tasks: one-line puzzles for a model of 90 thousand weights whose tokens are single characters.

There are seven prior tasks, which pretraining teaches and the model may forget, and a target, a small Countdown. A
prompt is a letter, a problem and "=": the answer to `A37+48=` is `85`. A hash assigns each problem to pretraining, to
training or to the test, so these never share a problem.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from es_jax.tasks.task import Example, Score, Splits, check_count, check_known

CHARACTERS = "0123456789+-=:<ABCDEFGHIJKLMNOPQRSTUVWXYZyn*/(), ."  # one token each
DEFAULT = {"train": 500, "test": 200}  # problems
SPLITS = ("test", "train", "train", *["pretrain"] * 7)  # by the last digit of the hash
Problem = tuple[str, str, str]  # text, key and answer of a problem
Draw = Callable[[random.Random], Problem]


class Kind(NamedTuple):
    """One kind of puzzle. Problems with one key stay in one split."""

    draw: Draw
    form: str  # a regular expression for well-formed answers
    train: int  # number of different training problems
    test: int


def _two(rng: random.Random) -> tuple[int, int]:
    return rng.randint(10, 99), rng.randint(10, 99)


def _add(rng: random.Random) -> Problem:
    a, b = _two(rng)
    return f"A{a}+{b}=", f"{min(a, b)} {max(a, b)}", str(a + b)


def _subtract(rng: random.Random) -> Problem:
    b, a = sorted(_two(rng))
    return f"S{a}-{b}=", f"{a} {b}", str(a - b)


def _compare(rng: random.Random) -> Problem:
    a, b = _two(rng)
    return f"C{a}<{b}=", f"{a} {b}", "y" if a < b else "n"


def _of_digits(letter: str, answer: Callable[[str], str]) -> Draw:
    """A puzzle of five digits."""

    def draw(rng: random.Random) -> Problem:
        digits = f"{rng.randrange(100_000):05}"
        return f"{letter}{digits}=", digits, answer(digits)

    return draw


def _count(rng: random.Random) -> Problem:
    digit, count = rng.choice("0123456789"), rng.randint(0, 5)
    others = "0123456789".replace(digit, "")
    digits = [digit] * count + [rng.choice(others) for _ in range(5 - count)]
    rng.shuffle(digits)
    text = "".join(digits)
    return f"N{digit}:{text}=", f"{digit} {text}", str(count)


def _countdown(rng: random.Random) -> Problem:
    digits = [rng.randint(1, 9) for _ in range(3)]
    a, b, c = rng.sample(digits, 3)
    x, y = rng.choice("+-"), rng.choice("+-")
    answer = f"{a}{x}{b}{y}{c}"
    target = _value(answer)
    if target < 0:
        return _countdown(rng)
    return f"K{''.join(map(str, digits))}:{target}=", f"{sorted(digits)} {target}", answer


def _value(expression: str) -> int:
    """The value of digit sign digit sign digit."""
    return sum(int(sign + digit) for sign, digit in zip("+" + expression[1::2], expression[::2], strict=True))


DIGITS = r"[0-9]+"
KINDS = MappingProxyType(
    {
        "countdown": Kind(_countdown, r"[0-9][+-][0-9][+-][0-9]", train=533, test=292),
        "add": Kind(_add, DIGITS, train=1628, test=768),
        "subtract": Kind(_subtract, DIGITS, train=819, test=392),
        "reverse": Kind(_of_digits("R", lambda digits: digits[::-1]), r"[0-9]{5}", train=19971, test=9930),
        "sort": Kind(_of_digits("O", lambda digits: "".join(sorted(digits))), r"[0-9]{5}", train=19984, test=10081),
        "maximum": Kind(_of_digits("M", max), r"[0-9]", train=20118, test=9900),
        "compare": Kind(_compare, r"[yn]", train=1679, test=821),
        "count": Kind(_count, r"[0-9]", train=199527, test=100378),
    }
)
PRIOR = tuple(f"lab-{kind}" for kind in KINDS if kind != "countdown")


@dataclass(frozen=True)
class Lab(Splits):
    """A laboratory task. Reward = answer + 0.1 · format: whether the answer is right, and whether it has the form that
    the puzzle asks for.

    Args:
      kind: a key of `KINDS`. For "countdown" any expression with + and − that uses each digit once and reaches the
        target is right; elsewhere there is one answer.
      seed: of the problems that `train` and `test` draw: they are distinct, 500 and 200 unless `n` says otherwise, and
        never pretraining problems.

    >>> task = Lab("countdown")
    >>> task.score(Example("0", "K347:14=", "3+4+7"), "7+4+3").reward
    1.1
    """

    kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("laboratory task", self.kind, KINDS)

    @property
    def name(self) -> str:
        """The task's key in `TASKS`, lab-add for example."""
        return f"lab-{self.kind}"

    def pretrain(self) -> Iterator[Example]:
        """An endless sequence of problems for pretraining; they repeat."""
        return self._draw("pretrain")

    def score(self, example: Example, completion: str) -> Score:
        """Reward in {0, 0.1, 1.1}; parts `answer` and `format`, each 0 or 1."""
        form = float(re.fullmatch(KINDS[self.kind].form, completion) is not None)
        right = form and completion == example.answer
        if form and self.kind == "countdown":  # it has other right answers, too
            digits, _, target = str(example.prompt)[1:].rstrip("=").partition(":")
            right = right or (sorted(completion[::2]) == sorted(digits) and _value(completion) == int(target))
        return Score(right + 0.1 * form, {"answer": float(right), "format": form})

    def extract_answer(self, example: Example, completion: str) -> str | None:
        """A completion in the form that the puzzle asks for; for "countdown" its value and its digits."""
        if re.fullmatch(KINDS[self.kind].form, completion) is None:
            return None
        if self.kind == "countdown":
            return f"{_value(completion)} from {''.join(sorted(completion[::2]))}"
        return completion

    def _draw(self, split: str) -> Iterator[Example]:
        rng = random.Random(f"{self.name} {split} {self.seed}")
        while True:
            prompt, key, answer = KINDS[self.kind].draw(rng)
            if split_of(self.kind, key) == split:
                yield Example(prompt, prompt, answer)

    def _examples(self, split: str, n: int | None) -> list[Example]:
        count, most = DEFAULT[split] if n is None else check_count(n), getattr(KINDS[self.kind], split)
        if count > most:  # else the loop would never end
            raise ValueError(f"n is {n}, but {self.name} has {most} {split} problems: ask for at most {most}")
        examples: dict[str, Example] = {}
        draws = self._draw(split)
        while len(examples) < count:
            example = next(draws)
            examples.setdefault(example.id, example)
        return list(examples.values())


def split_of(kind: str, key: str) -> str:
    """The split of a problem: a tenth are test problems, two tenths are for training, the rest for pretraining."""
    return SPLITS[int(hashlib.sha256(f"{kind} {key}".encode()).hexdigest(), 16) % len(SPLITS)]
