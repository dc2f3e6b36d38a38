"""What a task is: examples to train and test on, and a score for what a model wrote. It holds no model and no array."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, runtime_checkable

from es_jax.core.names import unknown

GRADERS = ("paper", "strict", "robust")
RULES = 2  # the version of their rules; increase it when a verdict changes
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # the line breaks of str.splitlines


class Message(TypedDict):
    """One turn of a chat, in the form that chat templates read: a role and its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One problem.

    Args:
      id: a text that is unique within a split.
      prompt: plain text, or messages. The completion continues a last message of role "assistant".
      answer: the reference answer; None where the task grades without one.
      meta: what else grading needs, such as the `numbers` and the `target` of countdown, and what the data say about
        the row.

    Examples:
      >>> Example("0", "2 + 2 = ", "4").meta
      {}
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a completion earned: the reward that training maximises, and the parts it is made of.

    Args:
      reward: a finite number. Training compares rewards within a step, so the scale is free.
      parts: names and numbers, such as "answer" (0 to 1, its mean is the accuracy) and "format".

    Examples:
      >>> Score(1.1, {"answer": 1.0, "format": 1.0}).parts["answer"]
      1.0
    """

    reward: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Choices:
    """A multiple-choice problem without generation: which continuation has the highest probability?"""

    prompt: str | tuple[Message, ...]  # the text before the continuations, like `Example.prompt`
    options: tuple[str, ...]  # continuations from where the prompt ends, in the order of the task's labels
    right: int  # index of the right one in `options`


@runtime_checkable
class Scorer(Protocol):
    """An object that grades completions: a task."""

    def score(self, example: Example, completion: str) -> Score | float:
        """Grades the text that a model wrote after the prompt.

        It depends on its arguments alone: a step grades the same completion of an example once. It never raises for a
        strange completion.

        Args:
          example: one of the task's examples.
          completion: what the model wrote.

        Returns:
          A `Score`, or a number, which is a reward. See `as_score`.
        """


@runtime_checkable
class Task(Scorer, Protocol):
    """What a task offers: training and test examples, and a score.

    It is a protocol: any object with these methods is a task. All entries of `es_jax.tasks.TASKS` are tasks. A task may
    also have a `name` for messages. `SimpleTask` is the shorter way to write one.

    Examples:
      >>> from es_jax.tasks import get_task
      >>> isinstance(get_task("lab-add"), Task)
      True
    """

    def train(self, n: int | None = None) -> list[Example]:
        """Returns the first training examples.

        Args:
          n: how many, at least 1. None is all of them, or the number that the task documents.

        Returns:
          `n` examples, the same ones at every call.

        Raises:
          ValueError: `n` is below 1 or more than the data hold, or a row is wrong.
          OSError: the rows cannot be read or fetched.
        """

    def test(self, n: int | None = None) -> list[Example]:
        """Returns the first test examples.

        Args:
          n: how many, at least 1. None is all of them, or the number that the task documents.

        Returns:
          `n` examples, the same ones at every call.

        Raises:
          ValueError: `n` is below 1 or more than the data hold, or a row is wrong.
          OSError: the rows cannot be read or fetched.
        """


@runtime_checkable
class ChoiceTask(Task, Protocol):
    """A task whose problems have options that can be compared without generation (check with `isinstance`)."""

    def choices(self, example: Example) -> Choices:
        """The options of one of this task's examples, as continuations to score."""


@runtime_checkable
class VotingTask(Task, Protocol):
    """A task that reports which answer its grader reads, so that several completions can vote."""

    def extract_answer(self, example: Example, completion: str) -> str | None:
        """The answer in a normal form, equal for answers that the grader cannot distinguish; None if there is none. It
        never raises, whatever the completion is."""


def as_score(value: Any) -> Score:
    """The result of a task's `score` as a Score. For a number, `answer` is 1 if the number is at least 1 (full marks).

    Examples:
      >>> as_score(True)
      Score(reward=1.0, parts={'answer': 1.0})
    """
    raw, raw_parts = (value.reward, value.parts) if isinstance(value, Score) else (value, {})
    for number in (raw, *raw_parts.values()):
        if not hasattr(number, "__float__"):  # text has no method item
            raise TypeError(f"score returned {value!r}: it must be a number, or a Score of numbers")
    reward = float(raw)
    parts = {"answer": float(reward >= 1)} | {name: float(part) for name, part in raw_parts.items()}
    if math.isfinite(parts["answer"]) and not 0 <= parts["answer"] <= 1:
        raise ValueError(f"score returned {value!r}: the part 'answer' must be 0 to 1, since its mean is the accuracy")
    return Score(reward, parts)


def name_of(task: Any) -> str:
    """The name of a task in messages: its own, or that of its class."""
    return str(getattr(task, "name", type(task).__name__))


class Splits:
    """The two splits of a task, from one method."""

    def train(self, n: int | None = None) -> list[Example]:
        """Returns the first training examples.

        Args:
          n: how many, at least 1. None is all of them, or the number that the task documents.

        Returns:
          `n` examples, the same ones at every call.

        Raises:
          ValueError: `n` is below 1 or more than the data hold, or a row is wrong.
        """
        return self._examples("train", n)

    def test(self, n: int | None = None) -> list[Example]:
        """Returns the first test examples.

        Args:
          n: how many, at least 1. None is all of them, or the number that the task documents.

        Returns:
          `n` examples, the same ones at every call.

        Raises:
          ValueError: `n` is below 1 or more than the data hold, or a row is wrong.
        """
        return self._examples("test", n)

    def _examples(self, split: str, n: int | None) -> list[Example]:
        raise NotImplementedError


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless the name is known."""
    if name not in known:
        raise ValueError(unknown(kind, name, known))


def all_views(grader: str, *, paper: bool, strict: bool, robust: bool, form: float | bool, bonus: float = 0.1) -> Score:
    """The score of a completion by all graders: reward = answer + bonus · format.

    `answer` is the verdict of the selected grader, one of GRADERS. The verdicts of all graders are always included, so
    that one generation shows how much an accuracy depends on the grader. `format` follows the published rule.

    Examples:
      >>> all_views("paper", paper=True, strict=False, robust=True, form=0.0)
      Score(reward=1.0, parts={'answer': 1.0, 'format': 0.0, 'paper': 1.0, 'strict': 0.0, 'robust': 1.0})
    """
    verdicts = {"paper": float(paper), "strict": float(strict), "robust": float(robust)}
    answer = verdicts[grader]
    return Score(answer + bonus * form, {"answer": answer, "format": float(form), **verdicts})


def messages(**contents: str) -> tuple[Message, ...]:
    """Messages with these roles, in this order.

    Examples:
      >>> messages(user="2 + 2?", assistant="It is ")
      ({'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': 'It is '})
    """
    return tuple(Message(role=role, content=content) for role, content in contents.items())


def response_text(example: Example, completion: str) -> str:
    """The assistant's whole turn: the part that the prompt opened, and the completion that continues it.

    Examples:
      >>> response_text(Example("0", messages(user="2 + 2?", assistant="<think>"), "4"), "easy</think>")
      '<think>easy</think>'
    """
    if isinstance(example.prompt, str) or not example.prompt or example.prompt[-1]["role"] != "assistant":
        return completion
    return example.prompt[-1]["content"] + completion


def last_line(text: str) -> str:
    """The last line that is not blank, without white space around it; "" if there is none.

    Examples:
      >>> last_line("one\\n two \\n\\n")
      'two'
    """
    text = text.strip()
    return text[max(map(text.rfind, LINE_ENDS)) + 1 :].strip()


def last_block(text: str) -> str | None:
    """The content of the last answer block, or None. A block extends from an opening tag to the next closing tag.

    Examples:
      >>> last_block("<answer>1</answer> or <answer>2</answer>")
      '2'
    """
    for piece in reversed(text.split("</answer>")[:-1]):
        _, tag, inside = piece.partition("<answer>")
        if tag:
            return inside
    return None


def check_count(n: int) -> int:
    """Returns `n`, the requested number of examples; raises ValueError unless it is a whole number ≥ 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}: ask for at least 1 example, or leave n out")
    return n


def take(examples: Sequence[Example], n: int | None, *, source: str) -> list[Example]:
    """The first `n` examples of a data set, which errors call `source`; None takes all.

    Examples:
      >>> [e.id for e in take([Example("a", "?", ""), Example("b", "?", "")], 1, source="two rows")]
      ['a']
    """
    if not examples:
        raise ValueError(f"{source} is empty: it needs at least one example")
    if n is not None and check_count(n) > len(examples):
        raise ValueError(
            f"n is {n}, but {source} has {len(examples)} examples: ask for at most {len(examples)} (task.train_size, "
            "or evals.rows for the test)"
        )
    return list(examples[:n])
