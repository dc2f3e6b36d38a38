"""ProofWriter: does a statement follow from a theory, is it refuted, or is it unknown? (arXiv 2012.13048.)"""

import re
from dataclasses import dataclass
from typing import ClassVar

from es_jax.tasks.rows import Hub, PublishedTask, Row, check_field, text_field
from es_jax.tasks.task import Example, Score, messages, response_text, two_views

LABELS = ("True", "False", "Unknown")
ASK = (
    "Facts and rules:\n{theory}\n\nStatement: {question}\n\nDo the facts and rules prove the statement (True), its "
    "opposite (False), or neither (Unknown)? Reason first. Then write a last line that is one of these, with nothing "
    "after it:\nAnswer: True\nAnswer: False\nAnswer: Unknown"
)
OPENING = "Reasoning:"
FORM = re.compile(r"answer: (true|false|unknown)")  # of a line in lower case
LINE = re.compile(r"answer\s*:\s*(true|false|unknown)")
WORD = re.compile(r"\b(?:true|false|unknown)\b")


def _label(value: str, name: str) -> str:
    label = value.capitalize()
    check_field(label in LABELS, name, value, f"one of {', '.join(LABELS)}")
    return label


def _native(row: Row) -> Example:
    theory, question = text_field(row, "theory"), text_field(row, "question")
    answer = _label(text_field(row, "answer"), "answer")
    prompt = messages(user=ASK.format(theory=theory, question=question), assistant=OPENING)
    meta = {name: row[name] for name in ("id", "QDep", "config") if row.get(name) is not None}
    return Example("", prompt, answer, meta)


@dataclass(frozen=True)
class ProofWriter(PublishedTask):
    """The ProofWriter task in an open world: reward = answer + 0.1 · format.

    Args:
      data_dir: folder with train and test rows, in the verl layout (`reward_model.ground_truth` one of True, False,
        Unknown) or with the fields `theory`, `question` and `answer`. None: tasksource/proofwriter from the hub.
      grader: "paper" or "strict"; docs/tasks.md has the rules of both, with examples.

    >>> ProofWriter().score(Example("0", "", "False"), "Anne is not kind.\\nAnswer: False")
    Score(reward=1.1, parts={'answer': 1.0, 'format': 1.0, 'strict': 1.0})
    """

    name: ClassVar[str] = "proofwriter"
    source = (Hub("tasksource/proofwriter", shuffle=True), _native, _label)  # rows of one theory stand together there

    def score(self, example: Example, completion: str) -> Score:
        """Paper: `final_label`. Format: the last line that is not empty is the answer line. Strict: that line alone.

        Upper and lower case are the same, and white space around a line does not count.
        """
        text, answer = response_text(example, completion).lower(), (example.answer or "").lower()
        last = FORM.fullmatch(text.strip().rpartition("\n")[2].strip())
        strict = last is not None and last[1] == answer
        return two_views(self.grader, paper=final_label(text) == answer, strict=strict, form=last is not None)


def final_label(response: str) -> str | None:
    """The label that the paper's grader reads out of a response, in lower case, or None.

    The last line `Answer: <label>`; else the last label that stands as a word anywhere. (The published rule has a step
    between the two, a last line that is a label or "answer is" and a label: that label is also the last word.)

    >>> final_label("Answer: True\\nIs it false?")
    'true'
    >>> final_label("So the answer is unknown")
    'unknown'
    """
    text = response.lower()
    for line in reversed(text.split("\n")):
        if match := LINE.fullmatch(line.strip()):
            return match[1]
    return next(reversed(WORD.findall(text)), None)
