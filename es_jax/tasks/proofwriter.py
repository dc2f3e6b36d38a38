"""ProofWriter: does a statement follow from a theory, is it refuted, or is it unknown? (arXiv 2012.13048.)"""

import re
from dataclasses import dataclass
from typing import ClassVar

from es_jax.tasks.robust import stated_truth
from es_jax.tasks.rows import Hub, PublishedTask, Row, check_field, text_field
from es_jax.tasks.task import Example, Score, all_views, last_line, messages, response_text

LABELS = ("True", "False", "Unknown")
ASK = (
    "Facts and rules:\n{theory}\n\nStatement: {question}\n\nDo the facts and rules prove the statement (True), its "
    "opposite (False), or neither (Unknown)? Reason first. Then write a last line that is one of these, with nothing "
    "after it:\nAnswer: True\nAnswer: False\nAnswer: Unknown"
)
OPENING = "Reasoning:"
FORM = re.compile(r"(?i:answer)\s*:\s*[A-Za-z]+")
LINE = re.compile(r"^[^\S\n]*(?i:answer)\s*:\s*([A-Za-z]+)[^\S\n]*$", re.MULTILINE)
CLOSE = re.compile(r"(?i:(?:final\s+)?answer\s*(?::|is\s)\s*)?([A-Za-z]+)[.!?,:;]*")
WORD = re.compile(r"\b(?:true|false|unknown)\b", re.IGNORECASE)


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
      grader: "paper", "strict" or "robust"; docs/grading.md has the rules, with examples.

    >>> ProofWriter().score(Example("0", "", "False"), "Anne is not kind.\\nAnswer: False").reward
    1.1
    """

    name: ClassVar[str] = "proofwriter"
    source = (Hub("tasksource/proofwriter", shuffle=True), _native, _label)  # there, rows of one theory are adjacent

    def extract_answer(self, example: Example, completion: str) -> str | None:
        """The label that the published grader reads; None for any other word."""
        label = (final_label(completion) or "").capitalize()
        return label if label in LABELS else None

    def score(self, example: Example, completion: str) -> Score:
        """Paper: `final_label` of the completion. Format: its last line is "Answer:" and a word. Strict: the last line
        of the turn is exactly the answer line with the right label. Robust: `robust.stated_truth` of the completion.

        The last line is the last one that is not blank. Case is ignored, and so is white space around a line.
        """
        turn = response_text(example, completion) if completion.strip() else ""  # the opening alone is not an answer
        answer = (example.answer or "").lower()
        paper, careful = (
            final_label(completion) == answer,
            stated_truth(completion, response_text(example, "")) == answer,
        )
        strict = turn.lower().strip().rpartition("\n")[2].strip() == f"answer: {answer}"
        form = FORM.fullmatch(last_line(completion)) is not None
        return all_views(self.grader, paper=paper, strict=strict, robust=careful, form=form)


def final_label(completion: str) -> str | None:
    """The label that the paper's grader reads from a completion, in lower case; if there is no label, another word or
    None.

    It is the word of the last line "Answer: word", where the word may come lines after the colon. Else it is the word
    of the last line that is not blank, if that is one word, optionally after "answer:" or "answer is". Else it is the
    last label that occurs as a word anywhere. A word that is not a label is not an answer.

    >>> final_label("Answer: True\\nIs it false?")
    'true'
    >>> final_label("So the answer is unknown")
    'unknown'
    >>> final_label("It is true.\\nDone.")
    'done'
    """
    if lines := LINE.findall(completion):
        return lines[-1].lower()
    if word := CLOSE.fullmatch(last_line(completion)):
        return word[1].lower()
    words = WORD.findall(completion)
    return words[-1].lower() if words else None
