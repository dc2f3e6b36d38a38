"""Countdown's grader against completions worked out by hand, hostile ones among them."""

import random
import re
import time

import pytest

from es_jax.tasks import Example, Score, get_task
from es_jax.tasks.countdown import format_score
from es_jax.tasks.task import last_block

OPENING = "Let me solve this step by step.\n<think>"
PROBLEMS = {
    "98": (44, 19, 35),
    "27.4": (98, 47, 47, 52),
    "-11": (69, 55, 25),
    "266.6666666666667": (60, 10, 57, 80),
    "56": (77, 12, 76, 49),
    "8": (2, 3, 1),
    "3": (7, 2, 1),
    "1": (5, 5, 1),
    "0": (0, 4, 9),
    "0.000029": (1, 50_000),
    "0.000031": (1, 50_000),
    "1936": (44, 2),
}
RIGHT = "44 + 19 + 35"


def example(target: str = "98", opening: str = OPENING) -> Example:
    prompt = ({"role": "user", "content": "?"}, {"role": "assistant", "content": opening})
    return Example("0", prompt, None, {"numbers": PROBLEMS[target], "target": target})


def paper_parts(score: Score) -> tuple[float, float, float]:
    assert score.parts["answer"] == score.parts["paper"]
    return score.parts["paper"], score.parts["format"], score.parts["strict"]


LAYOUTS = {  # name: (completion, answer, format); the numbers are 44, 19, 35 and the target 98
    "exact": (f"so</think>\n<answer>{RIGHT}</answer>", 1, 1.0),
    "empty thought": (f"</think>\n<answer>{RIGHT}</answer>", 1, 1.0),
    "no newline between": (f"so</think><answer>{RIGHT}</answer>", 1, 0.6),
    "two newlines between": (f"so</think>\n\n<answer>{RIGHT}</answer>", 1, 0.6),
    "space and newline between": (f"so</think> \n<answer>{RIGHT}</answer>", 1, 0.6),
    "carriage return between": (f"so</think>\r\n<answer>{RIGHT}</answer>", 1, 0.6),
    "words between": (f"so</think>\nHence\n<answer>{RIGHT}</answer>", 1, 0.6),
    "full stop after": (f"so</think>\n<answer>{RIGHT}</answer>.", 1, 0.6),
    "newline after": (f"so</think>\n<answer>{RIGHT}</answer>\n", 1, 1.0),
    "two newlines after": (f"so</think>\n<answer>{RIGHT}</answer>\n\n", 1, 0.6),
    "carriage return after": (f"so</think>\n<answer>{RIGHT}</answer>\r\n", 1, 0.6),
    "blank after": (f"so</think>\n<answer>{RIGHT}</answer> ", 1, 0.6),
    "newlines inside and after": (f"so</think>\n<answer>{RIGHT}\n</answer>\n", 1, 1.0),
    "never stops thinking": ("so 44 plus 19", 0, 0.0),
    "empty completion": ("", 0, 0.0),
    "thought only": ("so</think>\n44 + 19 + 35", 0, 0.1),
    "answer only": (f"<answer>{RIGHT}</answer>", 1, 0.5),
    "answer before the thought ends": (f"<answer>{RIGHT}</answer></think>", 1, 0.6),
    "answer not closed": (f"so</think>\n<answer>{RIGHT}", 0, 0.1),
    "think tag repeated": (f"<think>so</think>\n<answer>{RIGHT}</answer>", 1, 1.0),
    "thinks twice": (f"so</think>\n<think>no</think>\n<answer>{RIGHT}</answer>", 1, 1.0),
    "last of two is right": (f"so</think>\n<answer>44</answer>\n<answer>{RIGHT}</answer>", 1, 1.0),
    "last of two is wrong": (f"so</think>\n<answer>{RIGHT}</answer>\n<answer>44 + 19</answer>", 0, 1.0),
    "nested": (f"so</think>\n<answer><answer>{RIGHT}</answer></answer>", 0, 1.0),
    "mentions the opening tag": (f"in <answer> tags</think>\n<answer>{RIGHT}</answer>", 0, 1.0),
    "mentions the pair": (f"in <answer> </answer> tags</think>\n<answer>{RIGHT}</answer>", 1, 1.0),
    "mentions the closing tag": (f"until </answer></think>\n<answer>{RIGHT}</answer>", 1, 1.0),
    "closes twice": (f"so</think>\n<answer>{RIGHT}</answer></answer>", 1, 1.0),
    "opens again at the end": (f"so</think>\n<answer>{RIGHT}</answer><answer>", 1, 0.6),
    "tags in capitals": (f"so</think>\n<ANSWER>{RIGHT}</ANSWER>", 0, 0.1),
    "space in a tag": (f"so</think>\n<answer>{RIGHT}</answer >", 0, 0.1),
    "tags share nothing": ("so</think>\n<answer></answe</answer>", 0, 1.0),
    "seam without an end": ("so</think>\n<answer>", 0, 0.1),
}

ANSWERS = [  # (what the answer block holds, target, answer)
    ("44+19+35", "98", 1),
    ("  ( 44+19 )+ 35 ", "98", 1),
    ("35 + 44 + 19", "98", 1),
    ("((((44)) + (19))) + 35", "98", 1),
    ("-(-44) + 19 + 35", "98", 1),
    ("+44 - -19 + +35", "98", 1),
    ("--44 + 19 - -+35", "98", 1),
    ("44 + 19 - 35", "98", 0),
    ("44 + 19 + 35 = 98", "98", 0),
    ("98", "98", 0),
    ("", "98", 0),
    ("   ", "98", 0),
    ("\n44 + 19 + 35\n", "98", 0),
    ("44 + 19 + 35\n", "98", 1),
    ("44 + 19 + 35 \n", "98", 1),
    ("44 + 19 + 35\n ", "98", 0),
    ("44 + 19 + 35\n\n", "98", 0),
    ("44 + 19 + 35\r\n", "98", 0),
    ("\n44 + 19 + 35", "98", 0),
    ("44 + 19\n+ 35", "98", 0),
    ("44\t+ 19 + 35", "98", 0),
    ("44 + 19 + 35 + 44 - 44", "98", 0),
    ("63 + 35", "98", 0),
    ("4419 + 35", "98", 0),
    ("4 4 + 19 + 35", "98", 0),
    ("44 19 35", "98", 0),
    ("044 + 19 + 35", "98", 0),
    ("0 * 4 * 9", "0", 1),
    ("00 * 4 * 9", "0", 0),
    ("44**2", "1936", 0),
    ("2 ** 3 * 1", "8", 0),
    ("2 * * 3 * 1", "8", 0),
    ("(2 + 1) + 3 * 1", "8", 0),
    ("7 // 2 * 1", "3", 0),
    ("7 / / 2 * 1", "3", 0),
    ("1 / (5 - 5)", "1", 0),
    ("5 / 5 * 1", "1", 1),
    ("1 / 50000", "0.000029", 1),
    ("1 / 50000", "0.000031", 0),
    ("(98 / (47 - 52)) + 47", "27.4", 1),
    ("(98 / (52 - 47)) + 47", "27.4", 0),
    ("69 - (55 + 25)", "-11", 1),
    ("10 / (60 - 57) * 80", "266.6666666666667", 1),
    ("(12 + 76) / (77 / 49)", "56", 1),
    ("(44)(19) + 35", "98", 0),
    ("(44 + 19 + 35", "98", 0),
    ("44 + 19 + 35)", "98", 0),
    ("44 + 19 + 35 ()", "98", 0),
    ("44 + 19 + 35 +", "98", 0),
    ("* 44 + 19 + 35", "98", 0),
    ("44, 19, 35", "98", 0),
    ("44.0 + 19 + 35", "98", 0),
    ("4_4 + 19 + 35", "98", 0),
    ("0x2c + 19 + 35", "98", 0),
    ("４４ + 19 + 35", "98", 0),
    ("٤٤ + 19 + 35", "98", 0),
    ("44¹ + 19 + 35", "98", 0),
    ("44 + 19 + 35\u00a0", "98", 0),
    ("44 − -19 + 35", "98", 0),
    ("44 + 19 + 35\0", "98", 0),
    ("__import__('os').getpid()", "98", 0),
    ("(" * 50 + RIGHT + ")" * 50, "98", 1),
    ("(" * 51 + RIGHT + ")" * 51, "98", 0),
    (RIGHT.ljust(500), "98", 1),
    (RIGHT.ljust(501), "98", 0),
]

MILLION = 1_000_000
MONSTERS = {  # name: (completion, answer, format)
    "deep": (f"so</think>\n<answer>{'(' * MILLION}{RIGHT}{')' * MILLION}</answer>", 0, 1.0),
    "open parentheses": ("so</think>\n<answer>" + "(" * MILLION + "</answer>", 0, 1.0),
    "ten megabytes of digits": ("so</think>\n<answer>" + "9" * 10 * MILLION + "</answer>", 0, 1.0),
    "ten megabytes of spaces": (f"so</think>\n<answer>{RIGHT}{' ' * 10 * MILLION}</answer>", 0, 1.0),
    "a long literal": ("so</think>\n<answer>" + "9" * 500 + "</answer>", 0, 1.0),
    "signs": ("so</think>\n<answer>" + "-" * MILLION + f"{RIGHT}</answer>", 0, 1.0),
    "opening tags": ("<answer>" * MILLION, 0, 0.0),
    "closing tags": ("</answer>" * MILLION, 0, 0.0),
    "blocks": ("<answer></answer>" * MILLION, 0, 0.5),
    "thoughts": ("<think></think>\n" * MILLION, 0, 0.1),
    "seams": ("</think>\n<answer>" * MILLION, 0, 0.1),
    "almost tags": ("</think>\n<answer</answer" * MILLION, 0, 0.1),
    "ten megabytes of prose": (f"{'no ' * 3 * MILLION}</think>\n<answer>{RIGHT}</answer>", 1, 1.0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    completion, answer, layout = LAYOUTS[name]
    score = get_task("countdown").score(example(), completion)
    assert paper_parts(score) == (answer, layout, answer if layout == 1.0 else 0)
    assert score.reward == answer + 0.1 * layout


@pytest.mark.parametrize(("text", "target", "answer"), ANSWERS)
def test_answer(text: str, target: str, answer: int) -> None:
    score = get_task("countdown").score(example(target), f"so</think>\n<answer>{text}</answer>")
    assert paper_parts(score) == (answer, 1.0, answer)


@pytest.mark.parametrize("name", MONSTERS)
def test_monster(name: str) -> None:
    completion, answer, layout = MONSTERS[name]
    task, start = get_task("countdown"), time.process_time()
    score = task.score(example(), completion)
    assert time.process_time() - start < 1
    assert paper_parts(score) == (answer, layout, answer if layout == 1.0 else 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_strict_counts_an_answer_only_in_the_exact_format(name: str) -> None:
    completion, answer, layout = LAYOUTS[name]
    score = get_task("countdown", grader="strict").score(example(), completion)
    assert score.parts["answer"] == score.parts["strict"] == (answer if layout == 1.0 else 0)
    assert score.parts["format"] == layout
    assert score.reward == score.parts["answer"] + 0.1 * layout


def test_tags_of_the_open_turn_count() -> None:
    opened = example(opening="<think>so</think>\n<answer>44 + ")
    assert get_task("countdown").score(opened, "19 + 35</answer>").reward == 1.1


def test_plain_prompt_needs_no_open_turn() -> None:
    plain = Example("0", "?", None, {"numbers": (44, 19, 35), "target": "98"})
    for completion in (
        f"<think>so</think>\n<answer>{RIGHT}</answer>",
        f"so</think>\n<answer>{RIGHT}</answer>",
    ):
        assert get_task("countdown").score(plain, completion).reward == 1.1


def test_tags_are_found_as_regular_expressions_find_them() -> None:
    rng = random.Random(0)
    words = ["<think>", "</think>", "\n", "<answer>", "</answer>", "</think>\n<answer>", "1"]
    exact = re.compile(r"<think>.*?</think>\n<answer>.*?</answer>\n?", re.DOTALL)
    hits = 0
    for _ in range(20_000):
        text = "".join(rng.choices(words, k=rng.randint(0, 8)))
        blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        assert last_block(text) == (blocks[-1] if blocks else None), text
        is_exact = exact.fullmatch("<think>" + text) is not None
        assert (format_score(text, has_answer=bool(blocks)) == 1.0) == is_exact, text
        hits += is_exact
    assert hits > 500
