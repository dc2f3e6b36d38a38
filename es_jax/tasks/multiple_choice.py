"""Multiple choice: HellaSwag, PIQA, ARC-Challenge and MMLU-Pro are records of one renderer and one grader."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from es_jax.core.names import unknown
from es_jax.tasks.choice_datasets import SETS, Question, Set
from es_jax.tasks.data import FieldError, checked, find_split, read_rows
from es_jax.tasks.rows import Row, hub_rows, load_examples
from es_jax.tasks.task import Choices, Example, Score, check_grader, response_text, two_views

CONTINUATIONS = ("label", "text")


@dataclass(frozen=True)
class MultipleChoice:
    """A multiple-choice task: reward 1 for the right option, else 0.

    Args:
      kind: a key of `questions.SETS`, which is also the task's name.
      data_dir: folder with the rows, in the verl layout (`reward_model.ground_truth` a label) or with the data set's
        own fields; MMLU-Pro's worked examples are its validation rows. None: the data set from the hub.
      grader: "paper" or "strict"; docs/tasks.md has the rules of both, with examples.
      continuation: what `choices` compares: "label", the asked form with each label after the same prompt; or "text",
        each option's own words after the bare question.

    Raises:
      ValueError: the set, the grader or the continuation is unknown.

    >>> task = MultipleChoice("arc-challenge")
    >>> task.score(Example("0", "", "B"), "A stone sinks. The answer is (B).")
    Score(reward=1.0, parts={'answer': 1.0, 'format': 1.0, 'strict': 1.0})
    """

    kind: str
    data_dir: str | Path | None = None
    grader: str = "paper"
    continuation: str = "label"

    def __post_init__(self) -> None:
        if self.kind not in SETS:
            raise ValueError(unknown("multiple-choice set", self.kind, SETS))
        if self.continuation not in CONTINUATIONS:
            raise ValueError(unknown("continuation", self.continuation, CONTINUATIONS))
        check_grader(self.grader)

    @property
    def name(self) -> str:
        """hellaswag, piqa, arc-challenge or mmlu-pro."""
        return self.kind

    @property
    def _set(self) -> Set:
        return SETS[self.kind]

    def train(self, n: int | None = None) -> list[Example]:
        """The first `n` training examples; raises ValueError or OSError as `rows.load_examples`."""
        return self._load("train", n)

    def test(self, n: int | None = None) -> list[Example]:
        """The first `n` test examples (labelled ones: HellaSwag's and PIQA's validation rows); raises like `train`."""
        return self._load("test", n)

    def _load(self, split: str, n: int | None) -> list[Example]:
        worked = _Worked(self._set, self.data_dir)
        native = lambda row: _example(self._set, row, worked)  # noqa: E731
        return load_examples(self._set.hub, split, n, data_dir=self.data_dir, native=native, verl=self._checked)

    def _checked(self, example: Example) -> Example:
        if example.answer not in tuple(self._set.labels):
            raise FieldError("reward_model.ground_truth", example.answer, f"one of {', '.join(self._set.labels)}")
        return example

    def score(self, example: Example, completion: str) -> Score:
        """Paper: `Set.paper_label`. Format: the asked form, see `Set.asked_label`. Strict: its label."""
        opening, wanted = response_text(example, "") if self._set.letters else "", example.answer
        asked = self._set.asked_label(opening, completion)
        strict = asked is not None and asked == wanted
        paper = self._set.paper_label(opening, completion) == wanted
        return two_views(self.grader, paper=paper, strict=strict, form=float(asked is not None), bonus=0.0)

    def choices(self, example: Example) -> Choices:
        """The options as continuations to score, see `continuation`.

        Raises:
          ValueError: `continuation` is "text", but the example came from a verl row, without the options' texts.
        """
        texts = example.meta.get("options")
        labels = self._set.labels[: len(texts)] if texts else self._set.labels
        right = labels.index(str(example.answer))
        if self.continuation == "label":
            return Choices(example.prompt, tuple(self._set.asked.format(label) for label in labels), right)
        if not texts:
            raise ValueError(f"example {example.id!r} has no options' texts: set continuation to 'label'")
        return Choices(example.meta["stem"], tuple(f" {text}" for text in texts), right)


@dataclass
class _Worked:
    """The worked examples of a set, by group; read when the first row asks for them."""

    source: Set
    data_dir: str | Path | None
    questions: list[Question] = field(default_factory=list)

    def of(self, question: Question) -> Sequence[Question]:
        """The first ones of the question's group; one that is asked itself is left out, even if few are left."""
        shots = self.source.shots
        if not shots:
            return ()
        if not self.questions:
            self.questions = self._read()
        counts = Counter(x.group for x in self.questions)
        if counts[question.group] < shots:
            enough = ", ".join(sorted(group for group in counts if counts[group] >= shots)) or "none"
            wanted = f"a category with {shots} worked examples or more in the validation rows"
            found = f"this one has {counts[question.group]}, and those with enough are: {enough}"
            raise FieldError("category", question.group, f"{wanted} ({found})")
        return [x for x in self.questions if x.group == question.group and x.text != question.text][:shots]

    def _read(self) -> list[Question]:
        """Every validation row; raises ValueError for a bad one, which names its own file or split, row and field."""
        if self.data_dir is None:
            hub = self.source.hub
            return list(checked(hub_rows(hub, "validation"), f"{hub.path}, split validation", self._worked))
        path = find_split(self.data_dir, "validation")
        return list(checked(read_rows(path), str(path), self._worked))

    def _worked(self, row: Row, number: int) -> Question:
        question = self.source.read(row)
        if not question.worked:
            raise FieldError("cot_content", row.get("cot_content"), "the worked answer, text that is not empty")
        return question


def _example(source: Set, row: Row, worked: _Worked) -> Example:
    question = source.read(row)
    blocks = [f"{_posed(source, x)}\nAnswer: {x.worked}" for x in worked.of(question)]
    content = "\n\n".join([*blocks, _posed(source, question), source.ask])
    meta = {"options": question.options, "stem": source.stem.format(question.text)}
    if question.group:
        meta["category"] = question.group
    return Example(question.id, ({"role": "user", "content": content},), source.labels[question.right], meta)


def _posed(source: Set, question: Question) -> str:
    options = "\n".join(f"{label}. {text}" for label, text in zip(source.labels, question.options, strict=False))
    return f"{source.heading.format(question.text)}\n{options}"
