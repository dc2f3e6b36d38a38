"""The multiple-choice data sets: their rows, what their prompts ask for, and how their completions are read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from es_jax.tasks.data import FieldError
from es_jax.tasks.rows import Hub, Row, text_field, texts_field

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """A row of any of the sets: its text, its options, which is right, and MMLU-Pro's category and worked answer."""

    id: str
    text: str
    options: tuple[str, ...]
    right: int
    group: str = ""
    worked: str = ""


@dataclass(frozen=True)
class Set:
    """One data set.

    Args:
      hub: where its rows are.
      read: row → `Question`; raises `FieldError`.
      labels: one character an option.
      heading: the question in a prompt.
      stem: the question when the options' words are scored as its continuations.
      ask: the last words of a prompt.
      asked: the asked form, with {} for the label.
      form: finds the asked form in an output without white space at its end: all of it for digits, its end for letters.
      paper: what the paper's grader looks for, in this order, first match of the first that is found.
      letters: the labels are letters: the paper's grader looks in the upper-cased text, and the prompt's opening may
        begin the asked form, "The answer is (". Digits are asked for alone, so there the opening is not looked at.
      shots: worked examples before the question.
    """

    hub: Hub
    read: Callable[[Row], Question]
    labels: str
    heading: str
    stem: str
    ask: str
    asked: str
    form: re.Pattern[str]
    paper: tuple[re.Pattern[str], ...]
    letters: bool = False
    shots: int = 0

    def paper_label(self, opening: str, completion: str) -> str | None:
        """The label that the paper's grader reads out of a completion, or None.

        The opening of the assistant's turn, which the completion goes on from, may begin what is found, not hold it.
        """
        if self.letters:
            opening, completion = opening.upper(), completion.upper()
        labels = (_written(pattern, opening, completion) for pattern in self.paper)
        return next((label for label in labels if label), None)

    def asked_label(self, opening: str, completion: str) -> str | None:
        """The label of the asked form, or None; the opening as in `paper_label`."""
        return _written(self.form, opening, completion.rstrip())


def _written(pattern: re.Pattern[str], opening: str, completion: str) -> str | None:
    """The first label of a pattern that stands in the completion: one in the opening is not the model's choice."""
    found = pattern.finditer(opening + completion)
    return next((match[1] for match in found if match.start(1) >= len(opening)), None)


def _letters(labels: str) -> dict:
    """The asked form and the patterns of a set whose labels are letters."""
    span = f"[{labels[0]}-{labels[-1]}]"
    return dict(
        labels=labels,
        asked="The answer is ({})",
        form=re.compile(rf"(?<!\w)The answer is \(({span})\)\.?\Z"),
        paper=tuple(
            re.compile(pattern) for pattern in (rf"ANSWER IS \(({span})\)", rf"ANSWER IS ({span})\b", rf"\b({span})\b")
        ),
        letters=True,
    )


def _hellaswag(row: Row) -> Question:
    text = _unmarked(f"{text_field(row, 'activity_label')}: {text_field(row, 'ctx')}")
    options = texts_field(row, "endings", row.get("endings"), least=4, most=4)
    right = _index(row, "label", {str(i): i for i in range(4)} | {i: i for i in range(4)})
    return Question("", text, tuple(map(_unmarked, options)), right)


def _unmarked(text: str) -> str:
    """WikiHow's section marks, [title] and the like, taken out."""
    return " ".join(re.sub(r"\[(?:header|title|step|substeps?)\]", " ", text).split())


def _piqa(row: Row) -> Question:
    options = (text_field(row, "sol1"), text_field(row, "sol2"))
    right = _index(row, "label", {"1": 0, "2": 1, 0: 0, 1: 1})  # the hub counts from 0
    return Question("", text_field(row, "goal"), options, right)


def _arc(row: Row) -> Question:
    choices = row.get("choices")
    if isinstance(choices, Mapping):  # as on the hub
        names = ("choices.text", "choices.label", "answerKey")
        texts, labels = choices.get("text"), choices.get("label")
    else:
        names, texts, labels = ("options", "option_labels", "answer"), row.get("options"), row.get("option_labels")
    options = texts_field(row, names[0], texts, least=2, most=5)
    if not isinstance(labels, list) or len(set(map(str, labels))) != len(options):
        raise FieldError(names[1], labels, f"a list of {len(options)} different labels")
    right = _index(row, names[2], {label: i for i, label in enumerate(map(str, labels))})
    return Question(str(row.get("question_id") or row.get("id") or ""), text_field(row, "question"), options, right)


def _mmlu_pro(row: Row) -> Question:
    options = texts_field(row, "options", row.get("options"), least=2, most=len(LETTERS))
    right = _index(row, "answer", {label: i for i, label in enumerate(LETTERS[: len(options)])})
    name, worked = row.get("question_id"), row.get("cot_content")
    worked = worked.removeprefix("A:").strip() if isinstance(worked, str) else ""  # only of validation rows
    return Question(
        "" if name is None else str(name),
        text_field(row, "question"), options, right, text_field(row, "category"), worked
    )  # fmt: skip


def _index(row: Row, name: str, known: Mapping) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in known:
        raise FieldError(name, value, f"one of {', '.join(map(repr, known))}")
    return known[value]


SETS: Mapping[str, Set] = MappingProxyType(
    {
        "hellaswag": Set(
            hub=Hub("Rowan/hellaswag", test="validation"),
            read=_hellaswag,
            labels="0123",
            heading="Which ending continues this text best?\n\n{}\n",
            stem="{}",
            ask="Reply with the ending's number, 0, 1, 2 or 3, and nothing else.",
            asked="{}",
            form=re.compile(r"\A\s*([0-3])\Z"),
            paper=(re.compile(r"([0-3])"),),
        ),
        "piqa": Set(
            hub=Hub("ybisk/piqa", test="validation", revision="refs/convert/parquet"),  # main holds a script
            read=_piqa,
            labels="12",
            heading="Which of two ways reaches this goal?\n\nGoal: {}",
            stem="Goal: {}\nWay:",
            ask="Reply with the number of the better way, 1 or 2, and nothing else.",
            asked="{}",
            form=re.compile(r"\A\s*([12])\Z"),
            paper=(re.compile(r"\b([12])\b"),),
        ),
        "arc-challenge": Set(
            hub=Hub("allenai/ai2_arc", "ARC-Challenge"),
            read=_arc,
            heading="Question: {}",
            stem="Question: {}\nAnswer:",
            ask='Choose one option and reply "The answer is (X)", where X is its letter.',
            **_letters("ABCDE"),
        ),
        "mmlu-pro": Set(
            hub=Hub("TIGER-Lab/MMLU-Pro", train="validation"),
            read=_mmlu_pro,
            heading="Question: {}",
            stem="Question: {}\nAnswer:",
            ask='Reason step by step, as above, and end with "The answer is (X)", where X is the letter chosen.',
            shots=5,
            **_letters(LETTERS),
        ),
    }
)
