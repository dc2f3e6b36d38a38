"""Completions made to be expensive: every grader is done with 100 kB at once, and raises nothing."""

import random
import time

import pytest

from es_jax.tasks import Example, get_task

LENGTH = 100_000
LIMIT = (
    1.0  # seconds; a grader takes milliseconds, and one whose work grows with the square of the length takes minutes
)
UNITS = [
    "a", "A", "9", "-", "−", ".", ",", "$", "%", "#", "####", "#### ", " ", "\n", "\t", "\r", "\x00", "\u2028", "(",
    ")", "{", "}", "[", "]", "\\", "\\boxed{", "\\Boxed {", "\\frac{", "{,}", "<answer>", "</answer>", "<think>",
    "</think", "</think>", "Answer:", "answer is ", "The answer is (", "answer: true", "True ",
    "neither true nor false ", "B ", "A ", "(B) ", "option B ", "B is correct ", "clearly ", "is ", "=", "≈", "1 ",
    "1,", "123 ", "1/", "1e", "1 1/2 ", "½", "²", "×10^", "*", "_", "'", '"', "<|im_end|>", "<|", "two hundred ",
    "question", "Question:", "\nQuestion: 1\n", "Answer\n", "\ud800", "ß", "İ", "72 or ", "statement is ", "minus ",
    "$1/", "1=", "B or ", "not ", "\nB.",
]  # fmt: skip
EXAMPLES = {
    "countdown": Example("0", "?", None, {"numbers": (44, 19, 35), "target": "98"}),
    "gsm8k": Example("0", "?", "72"),
    "proofwriter": Example("0", "?", "True"),
    "piqa": Example("0", "?", "1"),
    "mmlu-pro": Example("0", "?", "B", {"options": ("x", "y")}),
}


def completions() -> list[str]:
    """Each unit again and again, alone and before another end; and mixtures of two to four of them."""
    draw = random.Random(0)
    mixed = ["".join(draw.choices(UNITS, k=draw.randint(2, 4))) for _ in range(40)]
    mixed += [first * 2000 + second * 2000 for first, second in (draw.choices(UNITS, k=2) for _ in range(20))]
    ends = ["", "x", "\n#### 72", "\n1"]
    return [(unit * (LENGTH // len(unit) + 1))[:LENGTH] + draw.choice(ends) for unit in UNITS + mixed]


@pytest.mark.parametrize("task", sorted(EXAMPLES))
def test_no_completion_is_expensive(task: str) -> None:
    grader, slow = get_task(task), {}
    for completion in completions():
        start = time.process_time()
        score = grader.score(EXAMPLES[task], completion)
        if time.process_time() - start > LIMIT:
            slow[completion[:80]] = time.process_time() - start
        assert all(0 <= part <= 1 for part in score.parts.values())
    assert not slow
