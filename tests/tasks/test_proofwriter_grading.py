"""ProofWriter's graders against completions worked out by hand, hostile ones among them."""

import time

import pytest

from es_jax.tasks import Example, get_task

LONG = 100_000

CASES = [  # (completion, the right answer, paper, format, strict)
    ("Anne is kind.\nAnswer: True", "True", 1, 1, 1),
    ("Answer: False", "False", 1, 1, 1),
    ("Answer: Unknown\n\n  \n", "Unknown", 1, 1, 1),
    ("  Answer: True  ", "True", 1, 1, 1),
    ("so\r\nAnswer: True\r\n", "True", 1, 1, 1),
    ("answer: TRUE", "True", 1, 1, 1),
    ("ANSWER: unknown", "Unknown", 1, 1, 1),
    ("Answer: True", "False", 0, 1, 0),
    ("Answer:True", "True", 1, 1, 0),
    ("Answer :  True", "True", 1, 1, 0),
    ("Answer: True.", "True", 1, 0, 0),
    ("**Answer: True**", "True", 1, 0, 0),
    ("The answer: True", "True", 1, 0, 0),
    ("Answer: True or False", "False", 1, 0, 0),
    ("Answer: True\nAnswer: False", "False", 1, 1, 1),
    ("Answer: False\nAnswer: True", "False", 0, 1, 0),
    ("Answer: True\nUnless it is false.", "True", 1, 0, 0),
    ("Answer: True\nfalse", "True", 1, 0, 0),
    ("Answer: True\nAnswer: maybe", "True", 0, 1, 0),
    ("True", "True", 1, 0, 0),
    ("It could be false.\nTrue", "True", 1, 0, 0),
    ("It could be false.\nThe answer is True", "True", 1, 0, 0),
    ("answer is unknown", "Unknown", 1, 0, 0),
    ("It is True that Anne is kind, so this is false.", "False", 1, 0, 0),
    ("This is false since it is true.", "False", 0, 0, 0),
    ("not true", "True", 1, 0, 0),
    ("untrue", "True", 0, 0, 0),
    ("truely", "True", 0, 0, 0),
    ("true-ish", "True", 1, 0, 0),
    ("true_", "True", 0, 0, 0),
    ("trueé", "True", 0, 0, 0),
    ("(True)", "True", 1, 0, 0),
    ("Answer: Yes", "True", 0, 1, 0),
    ("Ｔｒｕｅ", "True", 0, 0, 0),
    ("Т rue", "True", 0, 0, 0),
    ("", "Unknown", 0, 0, 0),
    ("\n\n", "Unknown", 0, 0, 0),
    ("I do not know", "Unknown", 0, 0, 0),
    ("Answer: True\u2028", "True", 1, 1, 1),
    ("Answer: True\0", "True", 1, 0, 0),
    ("Answer:\nTrue", "True", 1, 0, 0),
    ("Answer: True Answer: False", "False", 1, 0, 0),
    ("It is true.\nDone.", "True", 0, 0, 0),  # a last line of one word decides
    ("It is true.\nDone", "True", 0, 0, 0),
    ("It is true.\nDone?!", "True", 0, 0, 0),
    ("It is true.\nDone (so)", "True", 1, 0, 0),
    ("It is true.\nAll done.", "True", 1, 0, 0),
    ("It is true.\nÜ", "True", 1, 0, 0),  # not of A to Z
    ("It is true.\nQ2", "True", 1, 0, 0),
    ("It is true.\nAnswer is no.", "True", 0, 0, 0),
    ("It is true.\nFinal answer: false!", "False", 1, 0, 0),
    ("It is true.\nFINAL  ANSWER is False", "False", 1, 0, 0),
    ("It is true.\nThe answer is no", "True", 1, 0, 0),
    ("It is true.\nAnswer:", "True", 0, 0, 0),
    ("It is true.\nx\rNo", "True", 0, 0, 0),  # "\r" ends a line here
    ("Answer: False\rx", "False", 0, 0, 0),  # but not an answer line
    ("Answer: False\r\nx y", "False", 1, 0, 0),
    ("\t answer \n:\n\n False \nso true", "False", 1, 0, 0),
    ("so answer: False\nit is true, is it", "True", 1, 0, 0),  # not at the start of its line
    ("Answer: False.\nAnswer: True x\nunknown to me", "Unknown", 1, 0, 0),
    ("Answer: falsE\nAnswer: no\nAnswer: False.", "False", 0, 0, 0),
    ("Answer: UNKNOWN\n\n", "Unknown", 1, 1, 1),
    ("x\rAnswer: True", "True", 1, 1, 0),
    ("Answer: True,", "True", 1, 0, 0),
    ("Answer: T", "True", 0, 1, 0),
    ("Answer: untrue", "True", 0, 1, 0),
    ("Answer: 1", "True", 0, 0, 0),
]

MONSTERS = {
    "spaces": " " * LONG + "x",
    "spaces inside": "answer" + " " * LONG + ":" + " " * LONG + "1",
    "newlines": "\n" * LONG + "x",
    "answers": "Answer: " * LONG,
    "answer lines": "Answer: \n" * LONG,
    "almost labels": "tru" * LONG,
    "nuls": "\0" * LONG,
    "surrogates": "\ud800" * LONG,
    "one word": "true" * LONG,
}


@pytest.mark.parametrize(("completion", "answer", "paper", "form", "strict"), CASES)
def test_case(completion: str, answer: str, paper: int, form: int, strict: int) -> None:
    prompt = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "Reasoning:"})
    for example in (Example("0", "?", answer), Example("0", prompt, answer)):
        if example.prompt != "?":
            completion = "\n" + completion
        for grader, verdict in (("paper", paper), ("strict", strict)):
            score = get_task("proofwriter", grader=grader).score(example, completion)
            assert {**score.parts, "robust": None} == {
                "answer": verdict, "format": form, "paper": paper, "strict": strict, "robust": None
            }  # fmt: skip
            assert score.reward == verdict + 0.1 * form


@pytest.mark.parametrize("name", MONSTERS)
def test_monster(name: str) -> None:
    task, start = get_task("proofwriter"), time.process_time()
    for end in ("", "\nAnswer: True"):
        score = task.score(Example("0", "?", "True"), MONSTERS[name] + end)
        assert score.parts == dict.fromkeys(("answer", "format", "paper", "strict", "robust"), float(bool(end)))
    assert time.process_time() - start < 1


def test_the_prompts_opening_is_not_the_models() -> None:
    def parts(opening: str, completion: str) -> list[float]:
        prompt = ({"role": "user", "content": "?"}, {"role": "assistant", "content": opening})
        score = get_task("proofwriter").score(Example("0", prompt, "True"), completion)
        return [score.parts[name] for name in ("paper", "format", "strict", "robust")]

    assert parts("Answer: True", "") == parts("Answer: True", "\n") == [0, 0, 0, 0]
    assert parts("Answer:", " True") == [1, 0, 1, 1]  # only the strict grader joins them
    assert parts("Answer: False\n", "Answer: True") == [1, 1, 1, 1]
    assert parts("Reasoning:", " Answer: True") == [1, 1, 0, 1]
