"""The graders of multiple choice against completions worked out by hand, and the options that are scored instead."""

import time

import pytest

from es_jax.tasks import Choices, ChoiceTask, Example, get_task
from es_jax.tasks.multiple_choice import DATASETS

LONG = 100_000
PARTS = dict.fromkeys(("answer", "format", "paper", "strict", "robust"), 0)

CASES = {  # task: [(completion, the right label, paper, format, strict)]
    "hellaswag": [
        ("2", "2", 1, 1, 1),
        (" 2\n", "2", 1, 1, 1),
        ("3", "2", 0, 1, 0),
        ("0", "0", 1, 1, 1),
        ("2.", "2", 1, 0, 0),
        ("(2)", "2", 1, 0, 0),
        ("Ending 2", "2", 1, 0, 0),
        ("so it is\n2", "2", 1, 0, 0),
        ("2 is better than 1", "2", 1, 0, 0),
        ("Of the 4 endings, 2", "2", 1, 0, 0),
        ("Of the 3 others, 2", "2", 0, 0, 0),
        ("5", "2", 0, 0, 0),
        ("52", "2", 1, 0, 0),
        ("12", "2", 0, 0, 0),
        ("-2", "2", 1, 0, 0),
        ("two", "2", 0, 0, 0),
        ("²", "2", 0, 0, 0),
        ("２", "2", 0, 0, 0),
        ("٢", "2", 0, 0, 0),
        ("2.5", "2", 1, 0, 0),
        ("x2y", "2", 1, 0, 0),
        ("NaN", "2", 0, 0, 0),
        ("", "2", 0, 0, 0),
        ("\n\n", "2", 0, 0, 0),
        ("2\n2", "2", 1, 0, 0),
        ("2\0", "2", 1, 0, 0),
        ("in 1999 he\n2", "1", 1, 0, 0),
        ("B", "1", 0, 0, 0),
    ],
    "piqa": [
        ("1", "1", 1, 1, 1),
        ("2\n", "2", 1, 1, 1),
        ("2", "1", 0, 1, 0),
        ("1.", "1", 1, 0, 0),
        ("(2)", "2", 1, 0, 0),
        ("Way 2", "2", 1, 0, 0),
        ("12", "1", 0, 0, 0),
        ("21 or 2", "2", 1, 0, 0),
        ("1st", "1", 0, 0, 0),
        ("a1", "1", 0, 0, 0),
        ("1_000", "1", 0, 0, 0),
        ("1,000", "1", 1, 0, 0),
        ("1.5", "1", 1, 0, 0),
        ("-1", "1", 1, 0, 0),
        ("1/2", "2", 0, 0, 0),
        ("Both 1 and 2 work, 2 better", "2", 0, 0, 0),
        ("Of 2 ways the first", "2", 1, 0, 0),
        ("option two", "2", 0, 0, 0),
        ("0", "1", 0, 0, 0),
        ("3", "1", 0, 0, 0),
        ("１", "1", 0, 0, 0),
        ("¹", "1", 0, 0, 0),
        ("١", "1", 0, 0, 0),
        ("1é", "1", 0, 0, 0),
        ("é 1", "1", 1, 0, 0),
        ("", "1", 0, 0, 0),
        ("The better way is\n1", "1", 1, 0, 0),
        ("1\0", "1", 1, 0, 0),
    ],
    "arc-challenge": [
        ("The answer is (B)", "B", 1, 1, 1),
        ("The answer is (B).", "B", 1, 1, 1),
        ("The answer is (B).\n", "B", 1, 1, 1),
        ("It sinks. The answer is (B).", "B", 1, 1, 1),
        ("It sinks.\nThe answer is (B)", "B", 1, 1, 1),
        ("The answer is (C)", "B", 0, 1, 0),
        ("The answer is (E)", "E", 1, 1, 1),
        ("The answer is (F)", "F", 0, 0, 0),
        ("the answer is (b)", "B", 1, 1, 0),
        ("The answer is (B)!", "B", 1, 0, 0),
        ("The answer is (B) since it sinks", "B", 1, 0, 0),
        ("The answer is B", "B", 1, 0, 0),
        ("The answer is B.", "B", 1, 0, 0),
        ("The answer is C, no, the answer is (B)", "B", 1, 1, 0),
        ("The answer is (C), no, the answer is (B)", "B", 0, 1, 0),
        ("The answer is: (B)", "B", 1, 0, 0),
        ("A stone sinks: (B)", "B", 0, 0, 0),
        ("A stone sinks: (B)", "A", 1, 0, 0),
        ("The answer is a stone", "A", 1, 0, 0),
        ("The answer is always B", "B", 0, 0, 0),
        ("The answer is  (B)", "B", 1, 1, 0),
        ("B", "B", 1, 0, 0),
        ("b)", "B", 1, 0, 0),
        ("AB", "A", 0, 0, 0),
        ("I think B", "B", 1, 0, 0),
        ("D'accord, B", "D", 1, 0, 0),
        ("Bé, C", "C", 1, 0, 0),
        ("Ｂ", "B", 0, 0, 0),
        ("Б", "B", 0, 0, 0),
        ("2", "B", 0, 0, 0),
        ("", "B", 0, 0, 0),
        ("The answer is(B)", "B", 1, 1, 0),
        ("The answer is\t\n(B) . ", "B", 1, 0, 0),
        ("The answer is\u00a0(B).\u2028", "B", 1, 1, 0),
        ("The answer is (B)..", "B", 1, 0, 0),
        ("The answer is( B)", "B", 1, 0, 0),
        ("A. The answer isE", "E", 1, 0, 0),
        ("A. The answer is\n\nElephant", "E", 1, 0, 0),
        ("The answer is clearly (B)", "C", 1, 0, 0),
        ("The answer is decidedly C", "D", 1, 0, 0),
        ("The answer is B. The answer is C", "B", 1, 0, 0),
        ("The answer is fine, so is answer is E", "E", 1, 0, 0),
        ("The answer is: E", "E", 1, 0, 0),
        ("an answer is (F), answer is x, (C)", "C", 1, 0, 0),
        ("tHE aNSWER iS (D).", "D", 1, 1, 0),
        ("Thisanswer is (B)", "B", 1, 0, 0),
        ("notThe answer is (B)", "B", 1, 1, 0),
        ("The answer is (B)\n\nThe answer is (C)", "B", 1, 1, 0),  # paper: the first; the end is well-formed
    ],
    "mmlu-pro": [
        ("Let's think. 2 + 2 = 4. The answer is (J).", "J", 1, 1, 1),
        ("The answer is (J)", "J", 1, 1, 1),
        ("The answer is (A).", "J", 0, 1, 0),
        ("The answer is (K).", "J", 0, 0, 0),
        ("the answer is (j).", "J", 1, 1, 0),
        ("THE ANSWER IS (J)", "J", 1, 1, 0),
        ("The answer is J.", "J", 1, 0, 0),
        ("The answer is Jupiter", "J", 1, 0, 0),
        ("The answer is J-shaped", "J", 1, 0, 0),
        ("I believe it is J", "I", 1, 0, 0),
        ("I believe it is J", "J", 0, 0, 0),
        ("A guess: J", "A", 1, 0, 0),
        ("The final answer is (J)", "J", 1, 0, 0),
        ("So the answer is (J).", "J", 1, 1, 0),
        ("Answer: J", "J", 1, 0, 0),
        ("(J)", "J", 1, 0, 0),
        ("J", "J", 1, 0, 0),
        ("JJ", "J", 0, 0, 0),
        ("K, L or J", "J", 1, 0, 0),
        ("F(x) = J", "F", 1, 0, 0),
        ("2.5 e 7", "E", 1, 0, 0),
        ("ı", "I", 1, 0, 0),  # its upper case is I
        ("10**10000", "J", 0, 0, 0),
        ("nan", "J", 0, 0, 0),
        ("The answer is (J).\n\nQuestion: what next?", "J", 1, 0, 0),
        ("The answer is ((J))", "J", 1, 0, 0),
        ("The answer is (J", "J", 1, 0, 0),
        ("", "J", 0, 0, 0),
        ("\\boxed{J}", "J", 1, 0, 0),
    ],
}
ROWS = [(task, *case) for task, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("task", "completion", "answer", "paper", "form", "strict"), ROWS)
def test_case(task: str, completion: str, answer: str, paper: int, form: int, strict: int) -> None:
    example = Example("0", "?", answer)
    score = get_task(task).score(example, completion)
    assert (score.reward, score.parts["answer"], score.parts["format"]) == (paper, paper, form)
    assert (score.parts["paper"], score.parts["strict"]) == (paper, strict)
    score = get_task(task, grader="strict").score(example, completion)
    assert score.reward == score.parts["answer"] == score.parts["strict"] == strict


def test_there_are_enough_cases() -> None:
    assert set(CASES) == set(DATASETS) and all(len(cases) >= 25 for cases in CASES.values())


OPENED = [  # (task, the prompt's opening of the turn, completion, the right label, paper, format, strict)
    ("hellaswag", "Of endings 0 to 3 I choose ", "2", "2", 1, 1, 1),
    ("hellaswag", "Of endings 0 to 3 I choose ", "2", "0", 0, 1, 0),
    ("hellaswag", "Of endings 0 to 3 I choose", " 2\n", "2", 1, 1, 1),
    ("hellaswag", "Of endings 0 to 3 I choose ", "ending 2", "2", 1, 0, 0),
    ("hellaswag", "0", "", "0", 0, 0, 0),
    ("hellaswag", "<think>", "2", "2", 1, 1, 1),
    ("piqa", "Of ways 1 and 2 the better is ", "2", "2", 1, 1, 1),
    ("piqa", "Of ways 1 and 2 the better is ", "2.", "1", 0, 0, 0),
    ("piqa", "Way 1", "2", "2", 1, 1, 1),
    ("piqa", "Way ", "12", "2", 0, 0, 0),
    ("arc-challenge", "Answer: The answer is (", "B)", "B", 1, 1, 1),
    ("arc-challenge", "Answer: The answer is (", "B).", "B", 1, 1, 1),
    ("arc-challenge", "Answer: The answer is (", "B", "B", 1, 0, 0),
    ("arc-challenge", "The answer is", " (B).", "B", 1, 1, 1),
    ("arc-challenge", "The answer is (", "B), not C", "B", 1, 0, 0),
    ("arc-challenge", "THE ANSWER IS (", "b)", "B", 1, 1, 0),
    ("arc-challenge", "A careful choice: ", "B", "B", 1, 0, 0),
    ("arc-challenge", "A careful choice: ", "B", "A", 0, 0, 0),
    ("arc-challenge", "Not ", "the answer is (B).", "B", 1, 1, 0),
    ("arc-challenge", "The answer is (A)? ", "No. The answer is (B).", "B", 1, 1, 1),
    ("arc-challenge", "The answer is (A).", "", "A", 0, 0, 0),
    ("arc-challenge", "The answer is (A).", "\n", "A", 0, 0, 0),
    ("arc-challenge", "ß A ", "B", "B", 1, 0, 0),  # its upper case is longer
    ("mmlu-pro", "I think step by step. ", "So x = 2. The answer is (J).", "J", 1, 1, 1),
    ("mmlu-pro", "I think ", "it is J", "J", 1, 0, 0),
    ("mmlu-pro", "I think ", "it is J", "I", 0, 0, 0),
]


@pytest.mark.parametrize(("task", "opening", "completion", "answer", "paper", "form", "strict"), OPENED)
def test_a_label_in_the_prompts_opening_is_not_the_models(
    task: str, opening: str, completion: str, answer: str, paper: int, form: int, strict: int
) -> None:
    prompt = ({"role": "user", "content": "?"}, {"role": "assistant", "content": opening})
    score = get_task(task).score(Example("0", prompt, answer), completion)
    assert score.parts == {"answer": paper, "format": form, "paper": paper, "strict": strict, "robust": paper}


@pytest.mark.parametrize("task", DATASETS)
@pytest.mark.parametrize(
    "unit", ["The answer is (", "answer is. ", " ", "\n", "9", "-", "The answer is (Z)", "\0", "é"]
)
def test_monster(task: str, unit: str) -> None:
    example, start = Example("0", "?", DATASETS[task].labels[0]), time.process_time()
    assert get_task(task).score(example, unit * LONG).parts == PARTS
    assert time.process_time() - start < 1


@pytest.mark.parametrize("task", DATASETS)
def test_labels_as_continuations(task: str) -> None:
    """Every continuation that is scored is the asked form: the strict grader reads its label back."""
    grader = get_task(task)
    assert isinstance(grader, ChoiceTask) and not isinstance(get_task("gsm8k"), ChoiceTask)
    example = Example("0", "?", DATASETS[task].labels[1], {"options": ("x", "y")})
    choices = grader.choices(example)
    assert (choices.prompt, choices.right, len(choices.options)) == ("?", 1, 2)
    assert [grader.score(example, text).parts["strict"] for text in choices.options] == [0, 1]
    assert len(grader.choices(Example("0", "?", DATASETS[task].labels[1])).options) == len(DATASETS[task].labels)


def test_texts_as_continuations() -> None:
    task = get_task("piqa", continuation="text")
    example = Example("0", "?", "2", {"options": ("with a hammer", "with glue"), "stem": "Goal: fix it\nWay:"})
    assert task.choices(example) == Choices("Goal: fix it\nWay:", (" with a hammer", " with glue"), 1)
    with pytest.raises(ValueError, match="'0' has no options' texts: set continuation to 'label'"):
        task.choices(Example("0", "?", "2"))
