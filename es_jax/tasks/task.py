"""What a task is: examples to train and test on, and a score for what a model wrote. It holds no model and no array."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypedDict, runtime_checkable

from es_jax.core.names import unknown

GRADERS = ("paper", "strict")


class Message(TypedDict):
    """One turn of a chat, in the form chat templates read: a role and its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One problem.

    Args:
      id: unique within a split.
      prompt: plain text, or messages. The completion continues a last message of role "assistant".
      answer: the reference answer, or None where a task grades without one.
      meta: what else grading needs (countdown: `numbers`, `target`), and what the data said about the row.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a completion earned: the reward that training maximises, and the parts it is made of."""

    reward: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Choices:
    """A multiple-choice problem for a model that does not write: which continuation has the highest probability?"""

    prompt: str | tuple[Message, ...]  # what the continuations continue, as `Example.prompt`
    options: tuple[str, ...]  # continuations from where the prompt ends, in the order of the task's labels
    right: int  # index into `options` of the right one


@runtime_checkable
class Scorer(Protocol):
    """What grades completions: a task, or a view of one."""

    @property
    def name(self) -> str:
        """The task's key in `TASKS`."""

    def score(self, example: Example, completion: str) -> Score:
        """Grades the text a model wrote after the prompt. Never raises for a strange completion."""


@runtime_checkable
class Task(Scorer, Protocol):
    """What every entry of `es_jax.tasks.TASKS` offers."""

    def train(self, n: int | None = None) -> list[Example]:
        """The first `n` training examples (all of them, or the documented default, for None).

        Raises:
          ValueError: `n` < 1, or more than the data holds; a row is wrong.
          OSError: the rows cannot be had.
        """

    def test(self, n: int | None = None) -> list[Example]:
        """The first `n` test examples; otherwise like `train`."""


@runtime_checkable
class ChoiceTask(Task, Protocol):
    """A task whose problems have options, which can be compared without generation (`isinstance` tells)."""

    def choices(self, example: Example) -> Choices:
        """The options of one of this task's examples, as continuations to score."""


class Splits:
    """The two splits of a task, both from one method."""

    def train(self, n: int | None = None) -> list[Example]:
        """The first `n` training examples, see `Task.train`."""
        return self._examples("train", n)

    def test(self, n: int | None = None) -> list[Example]:
        """The first `n` test examples, see `Task.train`."""
        return self._examples("test", n)

    def _examples(self, split: str, n: int | None) -> list[Example]:
        raise NotImplementedError


@dataclass(frozen=True)
class PaperParts:
    """A task that grades as another one does, but with the published grader's parts, so that evaluations compare.

    >>> from es_jax.tasks import get_task
    >>> opened = Example("0", "2 + 2?", "4")
    >>> PaperParts(get_task("gsm8k", grader="strict")).score(opened, "It is 4")
    Score(reward=0.0, parts={'answer': 1.0, 'format': 0.0, 'strict': 0.0})
    """

    task: Any

    @property
    def name(self) -> str:
        """The other task's name."""
        return self.task.name

    @property
    def workers(self) -> Any:
        """How many processes grade for the other task, see `es_jax.scoring.workers`."""
        return getattr(self.task, "workers", 0)

    def score(self, example: Example, completion: str) -> Score:
        """Reward: of the task's own grader. Parts: of the published one."""
        own = self.task.score(example, completion)
        if getattr(self.task, "grader", "paper") == "paper":
            return own
        return Score(own.reward, replace(self.task, grader="paper").score(example, completion).parts)


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless the name is known."""
    if name not in known:
        raise ValueError(unknown(kind, name, known))


def two_views(grader: str, *, paper: bool, strict: bool, form: float | bool, bonus: float = 0.1) -> Score:
    """The score of a completion that both graders have looked at: reward = answer + bonus · format.

    `answer` is the verdict of the grader that is asked for. `strict`, the strict grader's, is there in both cases, so
    that one generation shows how much of an accuracy hangs on the form.

    >>> two_views("paper", paper=True, strict=False, form=0.0)
    Score(reward=1.0, parts={'answer': 1.0, 'format': 0.0, 'strict': 0.0})
    """
    answer = float(strict if grader == "strict" else paper)
    return Score(answer + bonus * form, {"answer": answer, "format": float(form), "strict": float(strict)})


def messages(**contents: str) -> tuple[Message, ...]:
    """Messages of these roles, in this order.

    >>> messages(user="2 + 2?", assistant="It is ")
    ({'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': 'It is '})
    """
    return tuple(Message(role=role, content=content) for role, content in contents.items())


def response_text(example: Example, completion: str) -> str:
    """The whole of the assistant's turn: what the prompt opened, and the completion that continues it.

    >>> response_text(Example("0", messages(user="2 + 2?", assistant="<think>"), "4"), "easy</think>")
    '<think>easy</think>'
    """
    if isinstance(example.prompt, str) or not example.prompt or example.prompt[-1]["role"] != "assistant":
        return completion
    return example.prompt[-1]["content"] + completion


def check_count(n: int) -> int:
    """Returns `n`, the number of examples asked for; raises ValueError unless it is a whole number ≥ 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}: ask for at least 1 example, or leave n out")
    return n


def take(examples: Sequence[Example], n: int | None, *, source: str) -> list[Example]:
    """The first `n` of a data set, which errors call `source`; all of it for None.

    >>> [e.id for e in take([Example("a", "?", ""), Example("b", "?", "")], 1, source="two rows")]
    ['a']
    """
    if not examples:
        raise ValueError(f"{source} is empty: it needs at least one example")
    if n is not None and check_count(n) > len(examples):
        raise ValueError(f"n is {n}, but {source} has {len(examples)} examples: ask for at most {len(examples)}")
    return list(examples[:n])
