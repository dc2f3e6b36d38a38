"""The laboratory's tasks: one-line puzzles for a model of 90 thousand weights that reads one character a token.

Seven prior tasks, which pretraining teaches and forgetting takes away, and a target, a small Countdown. A prompt is a
letter, a problem and "=": `A37+48=` is answered by `85`. Each problem belongs by its hash to pretraining, to training
or to the test, so the three never share one.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType

from es_jax.core.names import unknown
from es_jax.tasks.task import Example, Score, check_count

CHARACTERS = "0123456789+-=:<ABCDEFGHIJKLMNOPQRSTUVWXYZyn*/(), ."  # one token each
SPLITS = ("test", "train", "train", *["pretrain"] * 7)  # by the hash's last digit


@dataclass(frozen=True)
class Kind:
    """One puzzle: `draw` gives (problem, key, answer); problems of one key stay in one split."""

    draw: Callable[[random.Random], tuple[str, str, str]]
    form: str  # what a well-formed answer looks like, a regular expression
    train: int  # how many different training problems there are
    test: int


def _add(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    return f"A{a}+{b}=", f"{min(a, b)} {max(a, b)}", str(a + b)


def _subtract(draw: random.Random) -> tuple[str, str, str]:
    b, a = sorted((draw.randint(10, 99), draw.randint(10, 99)))
    return f"S{a}-{b}=", f"{a} {b}", str(a - b)


def _reverse(draw: random.Random) -> tuple[str, str, str]:
    digits = f"{draw.randrange(100_000):05}"
    return f"R{digits}=", digits, digits[::-1]


def _sort(draw: random.Random) -> tuple[str, str, str]:
    digits = f"{draw.randrange(100_000):05}"
    return f"O{digits}=", digits, "".join(sorted(digits))


def _maximum(draw: random.Random) -> tuple[str, str, str]:
    digits = f"{draw.randrange(100_000):05}"
    return f"M{digits}=", digits, max(digits)


def _compare(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    return f"C{a}<{b}=", f"{a} {b}", "y" if a < b else "n"


def _count(draw: random.Random) -> tuple[str, str, str]:
    which, length = draw.choice("0123456789"), draw.randint(0, 5)
    others = "0123456789".replace(which, "")
    digits = [which] * length + [draw.choice(others) for _ in range(5 - length)]
    draw.shuffle(digits)
    text = "".join(digits)
    return f"N{which}:{text}=", f"{which} {text}", str(length)


def _countdown(draw: random.Random) -> tuple[str, str, str]:
    digits = [draw.randint(1, 9) for _ in range(3)]
    a, b, c = draw.sample(digits, 3)
    x, y = draw.choice((1, -1)), draw.choice((1, -1))
    target = a + x * b + y * c
    if target < 0:
        return _countdown(draw)
    signs = {1: "+", -1: "-"}
    return f"K{''.join(map(str, digits))}:{target}=", f"{sorted(digits)} {target}", f"{a}{signs[x]}{b}{signs[y]}{c}"


DIGITS = r"[0-9]+"
KINDS = MappingProxyType(
    {
        "countdown": Kind(_countdown, r"[0-9][+-][0-9][+-][0-9]", train=533, test=292),
        "add": Kind(_add, DIGITS, train=1628, test=768),
        "subtract": Kind(_subtract, DIGITS, train=819, test=392),
        "reverse": Kind(_reverse, r"[0-9]{5}", train=19971, test=9930),
        "sort": Kind(_sort, r"[0-9]{5}", train=19984, test=10081),
        "maximum": Kind(_maximum, r"[0-9]", train=20118, test=9900),
        "compare": Kind(_compare, r"[yn]", train=1679, test=821),
        "count": Kind(_count, r"[0-9]", train=199527, test=100378),
    }
)
PRIOR = tuple(f"lab-{kind}" for kind in KINDS if kind != "countdown")


@dataclass(frozen=True)
class Lab:
    """A laboratory task. Reward = answer + 0.1 · format: right, and written in the form the puzzle asks for.

    Args:
      kind: a key of `KINDS`. For "countdown" any expression with + and − that uses each digit once and reaches the
        target is right; elsewhere there is one answer.
      seed: of the problems that `train` and `test` draw.

    Raises:
      ValueError: an unknown kind.

    >>> task = Lab("countdown")
    >>> task.score(Example("0", "K347:14=", "3+4+7"), "7+4+3").reward
    1.1
    """

    kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown("laboratory task", self.kind, KINDS))

    @property
    def name(self) -> str:
        """lab-add, lab-countdown, …"""
        return f"lab-{self.kind}"

    def train(self, n: int | None = None) -> list[Example]:
        """`n` distinct problems to train on, 500 by default; raises ValueError for `n` < 1 or more than there are."""
        return self._distinct("train", 500 if n is None else n, KINDS[self.kind].train)

    def test(self, n: int | None = None) -> list[Example]:
        """`n` distinct problems, 200 by default, none of them a training or pretraining one; raises like `train`."""
        return self._distinct("test", 200 if n is None else n, KINDS[self.kind].test)

    def pretrain(self) -> Iterator[Example]:
        """Problems to pretrain on, without end; they repeat."""
        return self._draw("pretrain")

    def score(self, example: Example, completion: str) -> Score:
        """Reward in {0, 0.1, 1.1}; parts `answer` and `format`, each 0 or 1."""
        form = float(re.fullmatch(KINDS[self.kind].form, completion) is not None)
        right = float(form and (completion == example.answer or self._solves(example, completion)))
        return Score(right + 0.1 * form, {"answer": right, "format": form})

    def _solves(self, example: Example, completion: str) -> bool:
        """Another right answer of a small Countdown; the form, digit sign digit sign digit, is known to hold."""
        if self.kind != "countdown":
            return False
        digits, _, target = str(example.prompt)[1:].rstrip("=").partition(":")
        a, b, c = (int(completion[i]) for i in (0, 2, 4))
        value = a + (b if completion[1] == "+" else -b) + (c if completion[3] == "+" else -c)
        return sorted(completion[::2]) == sorted(digits) and value == int(target)

    def _draw(self, split: str) -> Iterator[Example]:
        draw = random.Random(f"{self.name} {split} {self.seed}")
        while True:
            prompt, key, answer = KINDS[self.kind].draw(draw)
            if split_of(self.kind, key) == split:
                yield Example(prompt, prompt, answer)

    def _distinct(self, split: str, n: int, most: int) -> list[Example]:
        if check_count(n) > most:  # the draws would never end
            raise ValueError(f"n is {n}, but {self.name} has {most} {split} problems: ask for at most {most}")
        found: dict[str, Example] = {}
        draws = self._draw(split)
        while len(found) < n:
            example = next(draws)
            found.setdefault(example.id, example)
        return list(found.values())


def split_of(kind: str, key: str) -> str:
    """The split that a problem belongs to: a tenth are test problems, two tenths training, the rest pretraining."""
    return SPLITS[int(hashlib.sha256(f"{kind} {key}".encode()).hexdigest(), 16) % len(SPLITS)]
