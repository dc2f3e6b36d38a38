"""Multiple choice: HellaSwag, PIQA, ARC-Challenge and MMLU-Pro, as records that share one renderer and one grader."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from es_jax.tasks.robust import stated_choice
from es_jax.tasks.rows import Hub, PublishedTask, Row, Source, check_field, checked, open_split, text_field, texts_field
from es_jax.tasks.task import Choices, Example, Score, all_views, check_known, messages, response_text

LETTERS = "ABCDEFGHIJ"
ALONE = r"\A\s*([{0}])\Z"  # the form of digits


class Question(NamedTuple):
    """A row of one of the data sets."""

    text: str
    options: tuple[str, ...]
    right: int  # index of the right option
    id: str = ""
    category: str = ""  # the worked answer, in MMLU-Pro's rows
    worked: str = ""


@dataclass(frozen=True)
class ChoiceDataset:
    """One data set. {0} in patterns stands for its labels."""

    hub: Hub
    read: Callable[[Row], Question]  # raises FieldError
    labels: str  # one character per option: letters or digits
    heading: str  # the question in a prompt, with {} for its text
    stem: str  # the question when the options' words are scored as its continuations
    ask: str  # the last words of a prompt; they ask for the label in a certain form
    # The patterns of the paper's grader, in this order: the first match of the first pattern that is found. Then the
    # form that the end of a completion should have, without white space after it. Letters are matched in upper case.
    paper: tuple[str, ...] = (r"ANSWER IS\s*\(([{0}])\)", r"ANSWER IS\s*([{0}])", r"([{0}])(?<!\w.)(?!\w)")
    form: str = r"THE ANSWER IS\s*\(([{0}])\)\.?\Z"
    shots: int = 0  # worked examples before the question

    def paper_label(self, completion: str) -> str | None:
        """The label that the paper's grader reads out of a completion, or None."""
        found = (re.search(pattern.format(self.labels), completion.upper()) for pattern in self.paper)
        return next((match[1] for match in found if match), None)

    def well_formed(self, opening: str, completion: str) -> bool:
        """Whether a completion ends in the published form for letters, or is a single digit."""
        return self._label(self.form, opening.upper(), completion.upper()) is not None

    def asked_label(self, opening: str, completion: str) -> str | None:
        """The label if the completion has exactly the requested form, or None."""
        letters = r"The answer is \((?<!\w.{{15}})([{0}])\)\.?\Z"
        return self._label(letters if self.labels.isalpha() else ALONE, opening, completion)

    def _label(self, form: str, opening: str, completion: str) -> str | None:
        """The label at the end of a text in this form. With letters the form, but not the label, may begin in the
        opening of the assistant's turn ("The answer is ("); a digit must be the whole completion."""
        completion = completion.rstrip()
        text = opening + completion if self.labels.isalpha() else completion
        match = re.search(form.format(self.labels), text)
        return match[1] if match and len(text) - match.start(1) <= len(completion) else None

    def posed(self, question: Question) -> str:
        """The question and its labelled options, as in a prompt."""
        options = (f"{label}. {text}" for label, text in zip(self.labels, question.options, strict=False))
        return "\n".join([self.heading.format(question.text), *options])


@dataclass(frozen=True)
class MultipleChoice(PublishedTask):
    """A multiple-choice task: reward 1 for the right option, else 0.

    Args:
      kind: a key of `DATASETS`, which is also the task's name.
      data_dir: folder with the rows, in the verl layout (`reward_model.ground_truth` a label) or with the data set's
        own fields; MMLU-Pro's worked examples are its validation rows. None: the data set from the hub. The test rows
        of HellaSwag and PIQA are their validation rows, which have labels.
      grader: "paper", "strict" or "robust"; docs/grading.md has the rules, with examples.
      continuation: what `choices` compares: "label", the requested form with each label after the same prompt; or
        "text", each option's own words after the plain question.

    >>> task = MultipleChoice("arc-challenge")
    >>> task.score(Example("0", "", "B"), "A stone sinks. The answer is (B).").reward
    1.0
    """

    kind: str
    continuation: str = "label"

    def __post_init__(self) -> None:
        check_known("multiple-choice set", self.kind, DATASETS)
        check_known("continuation", self.continuation, ("label", "text"))
        super().__post_init__()

    @property
    def name(self) -> str:
        """hellaswag, piqa, arc-challenge or mmlu-pro."""
        return self.kind

    @property
    def source(self) -> Source:
        """See `PublishedTask.source`."""
        dataset = DATASETS[self.kind]

        def read_worked(row: Row, number: int) -> Question:
            value, question = row.get("cot_content"), dataset.read(row)
            check_field(question.worked, "cot_content", value, "the worked answer, text that is not empty")
            return question

        @cache  # read when first needed
        def worked() -> list[Question]:
            return list(checked(*open_split(dataset.hub, "validation", self.data_dir), read_worked))

        def native(row: Row) -> Example:
            question = dataset.read(row)
            shots = _shots(dataset.shots, question, worked()) if dataset.shots else ()
            blocks = [f"{dataset.posed(shot)}\nAnswer: {shot.worked}" for shot in shots]
            content = "\n\n".join([*blocks, dataset.posed(question), dataset.ask])
            meta = {"options": question.options, "stem": dataset.stem.format(question.text)}
            if question.category:
                meta["category"] = question.category
            return Example(question.id, messages(user=content), dataset.labels[question.right], meta)

        def check_answer(answer: str, name: str) -> str:
            check_field(answer in tuple(dataset.labels), name, answer, f"one of {', '.join(dataset.labels)}")
            return answer

        return dataset.hub, native, check_answer

    def score(self, example: Example, completion: str) -> Score:
        """Paper: `ChoiceDataset.paper_label`. Format: `ChoiceDataset.well_formed`. Strict: `ChoiceDataset.asked_label`.
        Robust: `robust.stated_choice`."""
        opening, dataset, answer = response_text(example, ""), DATASETS[self.kind], example.answer
        strict = dataset.asked_label(opening, completion) == answer
        robust = stated_choice(completion, opening, dataset.labels, example.meta.get("options", ())) == answer
        paper, form = dataset.paper_label(completion) == answer, dataset.well_formed(opening, completion)
        return all_views(self.grader, paper=paper, strict=strict, robust=robust, form=form, bonus=0.0)

    def extract_answer(self, example: Example, completion: str) -> str | None:
        """The label that the published grader reads."""
        return DATASETS[self.kind].paper_label(completion)

    def choices(self, example: Example) -> Choices:
        """The options as continuations to score; `continuation` = "text" needs an example with the options' texts.

        They continue the last words of the prompt, so they hold only the rest of the requested form, after a space if
        the prompt ends in a word or a punctuation mark.
        """
        texts = example.meta.get("options")
        labels = DATASETS[self.kind].labels[: len(texts) if texts else None]
        right = labels.index(str(example.answer))
        if self.continuation == "label":
            before = example.prompt if isinstance(example.prompt, str) else response_text(example, "")
            form = _rest_of_form(before) if labels.isalpha() else "{}"
            return Choices(example.prompt, tuple(_blank(before) + form.format(label) for label in labels), right)
        if not texts:
            raise ValueError(f"example {example.id!r} has no options' texts: set continuation to 'label'")
        stem = example.meta["stem"]
        return Choices(stem, tuple(_blank(stem) + text for text in texts), right)


def _blank(before: str) -> str:
    """The separator between a text and its continuation: a space, except after white space, open brackets and
    markup."""
    return " " if re.search(r"[^\s(\[{<>*`]\Z", before) else ""


def _rest_of_form(before: str) -> str:
    """The part of "The answer is ({})" that is missing at the end of a text; in most cases all of it."""
    for begun, rest in (r"\banswer\s+is\W*\(\s*", "{})"), (r"\banswer\s+is\W*", "({})"), (r"\banswer\s*", "is ({})"):
        if re.search(begun + r"\Z", before, re.IGNORECASE):
            return rest
    return "answer is ({})" if re.search(r"\bthe\s*\Z", before, re.IGNORECASE) else "The answer is ({})"


def _shots(count: int, question: Question, worked: Sequence[Question]) -> Sequence[Question]:
    """The first worked examples of the question's category, without the question itself, even if few remain."""
    counts = Counter(shot.category for shot in worked)
    own, enough = counts[question.category], sorted(name for name in counts if counts[name] >= count)
    wanted = f"a category with {count} worked examples or more in the validation rows"
    reason = f"this one has {own}; categories with enough are: {', '.join(enough) or 'none'}"
    check_field(own >= count, "category", question.category, f"{wanted} ({reason})")
    return [shot for shot in worked if shot.category == question.category and shot.text != question.text][:count]


def _hellaswag(row: Row) -> Question:
    text = _unmarked(f"{text_field(row, 'activity_label')}: {text_field(row, 'ctx')}")
    options = texts_field(row, "endings", least=4, most=4)
    right = _index(row, "label", {label: int(label) for label in (*"0123", *range(4))})
    return Question(text, tuple(map(_unmarked, options)), right)


def _unmarked(text: str) -> str:
    """The text without WikiHow's section marks, such as [title]."""
    return " ".join(re.sub(r"\[(?:header|title|step|substeps?)\]", " ", text).split())


def _piqa(row: Row) -> Question:
    options = (text_field(row, "sol1"), text_field(row, "sol2"))
    right = _index(row, "label", {"1": 0, "2": 1, 0: 0, 1: 1})  # the hub's labels count from 0
    return Question(text_field(row, "goal"), options, right)


def _arc(row: Row) -> Question:
    text, label, answer = "options", "option_labels", "answer"
    if isinstance(choices := row.get("choices"), Mapping):  # as on the hub
        text, label, answer = "choices.text", "choices.label", "answerKey"
        row = {**row, text: choices.get("text"), label: choices.get("label")}
    options, labels = texts_field(row, text, least=2, most=5), row.get(label)
    names = [str(x) for x in labels] if isinstance(labels, list) else []
    check_field(len(set(names)) == len(options), label, labels, f"a list of {len(options)} different labels")
    right = _index(row, answer, {name: i for i, name in enumerate(names)})
    return Question(text_field(row, "question"), options, right, id=str(row.get("question_id") or row.get("id") or ""))


def _mmlu_pro(row: Row) -> Question:
    options = texts_field(row, "options", least=2, most=len(LETTERS))
    right = _index(row, "answer", {label: i for i, label in enumerate(LETTERS[: len(options)])})
    name, worked = row.get("question_id"), row.get("cot_content")
    return Question(
        text_field(row, "question"),
        options,
        right,
        id="" if name is None else str(name),
        category=text_field(row, "category"),
        worked=worked.removeprefix("A:").strip() if isinstance(worked, str) else "",  # only for validation rows
    )


def _index(row: Row, name: str, known: Mapping) -> int:
    value: Any = row.get(name)
    valid = isinstance(value, str | int) and not isinstance(value, bool) and value in known
    check_field(valid, name, value, f"one of {', '.join(map(repr, known))}")
    return known[value]


DATASETS: Mapping[str, ChoiceDataset] = MappingProxyType(
    {
        "hellaswag": ChoiceDataset(
            hub=Hub("Rowan/hellaswag", test="validation"),
            read=_hellaswag,
            labels="0123",
            heading="Which ending continues this text best?\n\n{}\n",
            stem="{}",
            ask="Reply with the ending's number, 0, 1, 2 or 3, and nothing else.",
            paper=("([{0}])",),
            form=ALONE,
        ),
        "piqa": ChoiceDataset(
            hub=Hub("ybisk/piqa", test="validation", revision="refs/convert/parquet"),  # the main branch holds a script
            read=_piqa,
            labels="12",
            heading="Which of two ways reaches this goal?\n\nGoal: {}",
            stem="Goal: {}\nWay:",
            ask="Reply with the number of the better way, 1 or 2, and nothing else.",
            paper=(r"([{0}])(?<!\w.)(?!\w)",),
            form=ALONE,
        ),
        "arc-challenge": ChoiceDataset(
            hub=Hub("allenai/ai2_arc", "ARC-Challenge"),
            read=_arc,
            labels="ABCDE",
            heading="Question: {}",
            stem="Question: {}\nAnswer:",
            ask='Choose one option and reply "The answer is (X)", where X is its letter.',
        ),
        "mmlu-pro": ChoiceDataset(
            hub=Hub("TIGER-Lab/MMLU-Pro", train="validation"),
            read=_mmlu_pro,
            labels=LETTERS,
            heading="Question: {}",
            stem="Question: {}\nAnswer:",
            ask='Reason step by step, as above, and end with "The answer is (X)", where X is the letter chosen.',
            shots=5,
        ),
    }
)
