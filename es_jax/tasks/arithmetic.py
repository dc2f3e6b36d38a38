"""Exact arithmetic on untrusted text, and a search for an expression with a target value.

Python's own evaluator never sees what a model wrote. Length and nesting are bounded, so no input is expensive.

    sum     = product {("+" | "-") product}
    product = signed {("*" | "/") signed}
    signed  = {"+" | "-"} (number | "(" sum ")")
"""

import operator
import re
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

MAX_LENGTH = 500  # characters; it also keeps every literal within Python's limit for converting digits
MAX_DEPTH = 50  # nested parentheses
ALPHABET = frozenset("0123456789+-*/() ")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
TEMPLATES = ("({0} + {1})", "({0} - {1})", "({1} - {0})", "({0} * {1})", "({0} / {1})", "({1} / {0})")


class Expression(NamedTuple):
    """A parsed expression: its exact value, and its number literals from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def parse(text: str) -> Expression | None:
    """Parses and computes an expression of whole numbers, signs, + - * /, parentheses and spaces; otherwise None.

    Literals with a leading zero, divisions by zero, more than 500 characters and more than 50 nested parentheses also
    give None.

    >>> parse("(1 + 2) / 4")
    Expression(value=Fraction(3, 4), numbers=(1, 2, 4))
    >>> parse("2 ** 3") is None
    True
    """
    if len(text) > MAX_LENGTH or not ALPHABET.issuperset(text):
        return None
    parser = _Parser(text)
    try:
        value = parser.sum()
    except (SyntaxError, ZeroDivisionError):
        return None
    return None if parser.tokens else Expression(value, tuple(parser.numbers))


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = deque(re.findall(r"[0-9]+|[^0-9 ]", text))
        self.depth = 0
        self.numbers: list[int] = []

    def accept(self, choices: str) -> str:
        """Consumes and returns the next token if it is one of the choices; otherwise returns ""."""
        return self.tokens.popleft() if self.tokens and self.tokens[0] in choices else ""

    def sum(self) -> Fraction:
        return self.chain("+-", self.product)

    def product(self) -> Fraction:
        return self.chain("*/", self.signed)

    def chain(self, symbols: str, operand: Callable[[], Fraction]) -> Fraction:
        value = operand()
        while symbol := self.accept(symbols):
            value = OPERATIONS[symbol](value, operand())
        return value

    def signed(self) -> Fraction:
        sign = 1
        while symbol := self.accept("+-"):
            sign = -sign if symbol == "-" else sign
        return sign * (self.group() if self.accept("(") else self.number())

    def group(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise SyntaxError("nested too deeply")
        value = self.sum()
        if not self.accept(")"):
            raise SyntaxError("a parenthesis is not closed")
        self.depth -= 1
        return value

    def number(self) -> Fraction:
        literal = self.tokens.popleft() if self.tokens else ""
        if not literal.isdecimal() or (literal[0] == "0" and len(literal) > 1):
            raise SyntaxError("a number was expected")
        self.numbers.append(int(literal))
        return Fraction(self.numbers[-1])


def solve(candidates: Sequence[Sequence[int]], target: int) -> list[str | None]:
    """For each candidate, an expression that uses each of its numbers once and equals the target, or None.

    Candidates are sets of 1 to 5 numbers, all of the same size, and are searched together: 3 numbers take 108
    expressions, 4 numbers 3888, 5 numbers 233280.

    >>> solve([(2, 3, 4), (1, 1, 1)], 20)
    ['((2 + 3) * 4)', None]
    """
    states = np.asarray(candidates, np.float64)[:, None, :]  # [candidate, way of getting here, number]
    while states.shape[2] > 1:
        states = _combine(states)
    hits = np.abs(states[:, :, 0] - target) < 1e-9  # found with floats, checked exactly by _write
    return [
        _write(numbers, row.argmax(), target) if row.any() else None
        for numbers, row in zip(candidates, hits, strict=True)
    ]


def _combine(states: np.ndarray) -> np.ndarray:
    """Every way of replacing two numbers by their result, which comes first: [c, s, k] → [c, pairs · 6 · s, k − 1]."""
    blocks = []
    for i, j in combinations(range(states.shape[2]), 2):
        a, b = states[:, :, i], states[:, :, j]
        rest = np.delete(states, (i, j), axis=2)
        a_by_b, b_by_a = (np.divide(x, y, out=np.full_like(a, np.nan), where=y != 0) for x, y in ((a, b), (b, a)))
        for result in (a + b, a - b, b - a, a * b, a_by_b, b_by_a):  # the order of TEMPLATES
            blocks.append(np.concatenate([result[:, :, None], rest], axis=2))
    return np.concatenate(blocks, axis=1)


def _write(numbers: Sequence[int], index: np.intp, target: int) -> str | None:
    """Writes the `index`-th expression of the search, following the blocks of `_combine`."""
    blocks = np.unravel_index(index, [len(TEMPLATES) * comb(k, 2) for k in range(2, len(numbers) + 1)])
    items = list(map(str, numbers))
    for block in reversed(blocks):
        pair, operation = divmod(int(block), len(TEMPLATES))
        i, j = list(combinations(range(len(items)), 2))[pair]
        rest = [item for at, item in enumerate(items) if at not in (i, j)]
        items = [TEMPLATES[operation].format(items[i], items[j]), *rest]
    expression = parse(items[0])
    return items[0] if expression is not None and expression.value == target else None
