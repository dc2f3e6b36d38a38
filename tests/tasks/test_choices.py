"""Options as continuations: they go on with the prompt's own last words, and the asked form stands there once."""

import pytest

from es_jax.tasks import Example, get_task
from es_jax.tasks.task import messages

# (the end of the prompt, the continuation with the label B)
LETTERS = [
    ("", "The answer is (B)"),
    ("The answer is (", "B)"),
    ("The answer is ( ", "B)"),
    ("So the answer is", " (B)"),
    ("The answer is ", "(B)"),
    ("The answer is:", " (B)"),
    ("**The answer is **", "(B)"),
    ("ANSWER IS\n(", "B)"),
    ("The answer", " is (B)"),
    ("Thus the", " answer is (B)"),
    ("Let us see.", " The answer is (B)"),
    ("Let us see.\n", "The answer is (B)"),
    ("<think>", "The answer is (B)"),
    ("I breathe", " The answer is (B)"),
    ("The answer is (A)?", " The answer is (B)"),
]
DIGITS = [
    ("", "2"),
    ("The best one is", " 2"),
    ("Ending ", "2"),
    ("Ending (", "2"),
    ("Ending:", " 2"),
    ("<answer>", "2"),
]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("task", "label", "end", "wanted"),
    [(task, "B", *case) for task in ("arc-challenge", "mmlu-pro") for case in LETTERS]
    + [(task, "2", *case) for task in ("hellaswag", "piqa") for case in DIGITS],
)
def test_a_label_continues_the_prompt(task: str, label: str, end: str, wanted: str, plain: bool) -> None:
    prompt = end if plain else messages(user="Which?", assistant=end)
    choices = get_task(task).choices(Example("0", prompt, label))
    assert choices.prompt == prompt and choices.options[choices.right] == wanted


@pytest.mark.parametrize("opening", ["", "The answer is (", "The answer is", "The answer is ", "I see. ", "\n"])
@pytest.mark.parametrize("task", ["arc-challenge", "mmlu-pro"])
def test_what_is_scored_is_the_asked_form(task: str, opening: str) -> None:
    """The strict grader reads each label back, from the opening and the continuation together."""
    grader = get_task(task)
    for right, label in enumerate("ABCD"):
        example = Example("0", messages(user="Which?", assistant=opening), label, {"options": tuple("wxyz")})
        read = [grader.score(example, option).parts["strict"] for option in grader.choices(example).options]
        assert read == [right == i for i in range(4)]


@pytest.mark.parametrize(
    ("stem", "wanted"),
    [
        ("Goal: mend a cup\nWay:", " with glue"),
        ("A cup. ", "with glue"),
        ("A cup\n", "with glue"),
        ('"A cup"', " with glue"),
    ],
)
def test_a_text_has_one_blank_before_it(stem: str, wanted: str) -> None:
    task = get_task("piqa", continuation="text")
    example = Example("0", "?", "2", {"options": ("with tape", "with glue"), "stem": stem})
    assert task.choices(example).options[1] == wanted
