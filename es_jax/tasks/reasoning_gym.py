"""Tasks of reasoning-gym, generated problems with scorers of their own, by name: reasoning_gym:NAME.

`reasoning_gym_scorers` says which are taken. A process of its own makes the rows, with one seed for Python's hashes, so
that all processes and runs get the same; runs keep them (`es_jax.training.kept_rows`). A worker process scores.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from es_jax.core.extras import require
from es_jax.core.names import unknown
from es_jax.tasks.columns import SLOT, template
from es_jax.tasks.reasoning_gym_scorers import ALLOWED, REFUSED, VERSION
from es_jax.tasks.task import (
    Example,
    Score,
    Splits,
    check_count,
    check_known,
    last_block,
    messages,
    response_text,
)

logger = logging.getLogger(__name__)

PREFIX = "reasoning_gym:"
ASK = "Give the final answer between <answer> and </answer>."
GRADERS = ("tags", "whole")
OWN = ("seed", "prompt", "grader")  # options that are not the data set's
DEFAULT = {"train": 500, "test": 200}  # rows
DRAWS = 10_000  # the most rows that are looked at
SEEDS = 2**32 // (10 * DRAWS)  # data of seed s + 1 would be that of s moved by one row, so ours are further apart
LONGEST = 10_000  # characters of an answer
Row = Mapping[str, Any]


def is_name(name: str) -> bool:
    """Whether a task's name begins as those of reasoning-gym do here.

    >>> is_name("reasoning_gym:chain_sum"), is_name("reasoning_gym.games:Maze")
    (True, False)
    """
    return name.startswith(PREFIX)


def check_name(name: str) -> None:
    """Raises ValueError unless it is the name of a task that is taken; the package need not be installed."""
    short = name.removeprefix(PREFIX)
    if short in REFUSED:
        raise ValueError(f"task {name!r} is not taken: {REFUSED[short]}. Choose another, or write a task of your own")
    if short not in ALLOWED:
        raise ValueError(unknown("task of reasoning-gym", short, ALLOWED))


def maker(name: str) -> Callable[..., "ReasoningGym"]:
    """What makes the task of that name; its signature has our options and the data set's.

    Raises:
      ValueError: the task is not taken, or reasoning-gym has another version than the one that was read.
      ImportError: it is not installed.
    """
    check_name(name)
    _, config = _classes(short := name.removeprefix(PREFIX))
    names = [*OWN, *(f.name for f in dataclasses.fields(config) if f.name not in ("seed", "size"))]

    def make(**options: Any) -> ReasoningGym:
        own = {option: options.pop(option) for option in OWN if option in options}
        return ReasoningGym(short, options=options, **own)

    parameters = [inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None) for option in names]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return make


def _classes(name: str) -> tuple[Any, Any]:
    """The class of a data set, and that of its config."""
    require("reasoning_gym")
    if (version := importlib.metadata.version("reasoning-gym")) != VERSION:
        raise ValueError(
            f"reasoning-gym is {version} here, and its scorers were read in {VERSION}: "
            f"pip install reasoning-gym=={VERSION}"
        )
    from reasoning_gym.factory import DATASETS

    return DATASETS[name]


@dataclass(frozen=True)
class ReasoningGym(Splits):
    """A task of reasoning-gym. Reward: what its scorer gives the answer, 0 to 1, and 0 where there is none.

    The part `answer` is 1 for full marks, `format` 1 where the completion has an answer. A worker process scores.

    Args:
      dataset: its name there.
      seed: of the rows, 0 to 42948. A question belongs by its hash to training or to the test, whatever the seed.
      prompt: text with {question}, or messages with it; by default a user's message, and with "tags" also `ASK`.
      grader: "tags", the answer is what the last <answer>…</answer> holds; "whole", it is all that follows the last
        </think>. White space around it does not count.
      options: fields of the data set's config.

    Raises:
      ValueError: a value is wrong.

    >>> check_name("reasoning_gym:n_queens")
    Traceback (most recent call last):
    ValueError: task 'reasoning_gym:n_queens' is not taken: its scorer evaluates the answer as Python. Choose another, \
or write a task of your own
    """

    dataset: str
    seed: int = 0
    prompt: Any = None
    grader: str = "tags"
    options: Mapping[str, Any] = field(default_factory=dict)

    workers = 1
    timeout_seconds = 10.0  # of a score

    def __post_init__(self) -> None:
        check_known(f"grader of the task {self.name!r}", self.grader, GRADERS)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed of the task {self.name!r} is {self.seed!r}: set it to 0 to {SEEDS - 1}")
        if self.prompt is not None:
            prompt = template(self.prompt)
            texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
            for slot in {match[1] for text in texts for match in SLOT.finditer(text)} - {None, "question"}:
                raise ValueError(f"prompt of the task {self.name!r} has {{{slot}}}: it can have {{question}} alone")
            object.__setattr__(self, "prompt", prompt)
        _scorer(self.dataset, json.dumps(dict(self.options)))

    def __reduce__(self) -> Any:  # whoever unpickles it loads the library then, before a score is timed
        return ReasoningGym, (self.dataset, self.seed, self.prompt, self.grader, dict(self.options))

    @property
    def name(self) -> str:
        """What `get_task` calls it."""
        return PREFIX + self.dataset

    def name_and_options(self) -> tuple[str, dict[str, Any]]:
        """What `get_task` makes it of."""
        own = {option: getattr(self, option) for option in OWN if getattr(self, option) != _DEFAULTS[option]}
        return self.name, {**own, **self.options}

    def kept_as(self) -> dict[str, Any]:
        """What its rows depend on."""
        name, options = self.name_and_options()
        return {"task": name, "options": options, "reasoning_gym": VERSION}

    def score(self, example: Example, completion: str) -> Score:
        """What the scorer gives the answer, if it has the form that `ALLOWED` asks for."""
        answer = self.answer(example, completion)
        reward = 0.0 if answer is None else self._reward(example, answer)
        return Score(reward, {"answer": float(reward >= 1), "format": float(answer is not None)})

    def answer(self, example: Example, completion: str) -> str | None:
        """The answer that a completion gives, or None; one of more than `LONGEST` characters is none."""
        text = response_text(example, completion).rpartition("</think>")[2]
        found = text if self.grader == "whole" else last_block(text)
        return None if found is None or len(found) > LONGEST else found.strip()

    def _reward(self, example: Example, answer: str) -> float:
        if not fits(self.dataset, answer, example.answer):
            return 0.0
        entry = {"answer": example.answer, "metadata": ast.literal_eval(example.meta.get("metadata", "{}"))}
        try:
            with contextlib.redirect_stdout(None):
                reward = float(_scorer(self.dataset, json.dumps(dict(self.options))).score_answer(answer, entry))
        except Exception as error:
            _tell(self.name, error)
            return 0.0
        return min(reward, 1.0) if reward > 0 else 0.0  # of nan, too

    def _examples(self, split: str, n: int | None) -> list[Example]:
        count, looked = DEFAULT[split] if n is None else check_count(n), 0
        rows: dict[str, Row] = {}
        while len(rows) < count and looked < DRAWS:
            looked = min(max(2 * looked, 2 * count + 40), DRAWS)
            drawn = _drawn(self.dataset, json.dumps(dict(self.options)), self.seed, looked)
            rows = {}
            for row in drawn:
                if split_of(row["question"]) == split:
                    rows.setdefault(row["question"], row)
        if len(rows) < count:
            field = "task.train_size" if split == "train" else "evals.rows"
            raise ValueError(
                f"n is {count}, but task {self.name!r} has {len(rows)} different {split} rows among {DRAWS} with these "
                f"options: lower {field}, or set options under which there are more"
            )
        return [self.example(row) for row in [*rows.values()][:count]]

    def example(self, row: Row) -> Example:
        """A row as an example."""
        prompt = self.prompt
        if prompt is None:
            prompt = messages(user="{question}" + f"\n\n{ASK}" * (self.grader == "tags"))

        def filled(text: str) -> str:
            return SLOT.sub(lambda match: match[0][0] if match[1] is None else row["question"], text)

        if not isinstance(prompt, str):
            prompt = tuple({"role": one["role"], "content": filled(one["content"])} for one in prompt)
        meta = {"metadata": row["metadata"]} if ALLOWED[self.dataset].entry else {}
        return Example(str(row["id"]), filled(prompt) if isinstance(prompt, str) else prompt, row["answer"], meta)

    def check(self, example: Example) -> None:
        """Raises ValueError where a row's own reference does not earn full marks, as options may bring about."""
        if example.answer is None:
            return
        answer = example.answer.strip()
        if len(answer) > LONGEST or self._reward(example, answer) < 1:
            raise ValueError(
                f"row {example.id!r} of task {self.name!r}: its own reference {answer[:80]!r} does not earn full "
                f"marks; set other options than {dict(self.options)}"
            )


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ReasoningGym)}


def fits(dataset: str, answer: str, reference: str | None) -> bool:
    """Whether an answer has the form that the data set's scorer is trusted with.

    >>> fits("prime_factorization", "2 × 3", "2 × 3"), fits("prime_factorization", "two", "2 × 3")
    (True, False)
    """
    rule = ALLOWED[dataset]
    if rule.form is not None and not re.fullmatch(rule.form, answer):
        return False
    return not rule.longest or len(answer) <= len((reference or "").strip())


def split_of(question: str) -> str:
    """The split that a question belongs to: half of them are for training.

    >>> [split_of(question) for question in ("1 + 1", "1 + 2", "1 + 3", "1 + 4")]
    ['train', 'train', 'train', 'test']
    """
    return ("train", "test")[hashlib.sha256(question.encode()).digest()[0] % 2]


@functools.lru_cache(64)
def _scorer(dataset: str, options: str) -> Any:
    """The data set, to score with. ValueError for a value of an option that it does not take."""
    return _made(dataset, json.loads(options), seed=0, size=10)


def _made(dataset: str, options: Row, *, seed: int, size: int) -> Any:
    make, config = _classes(dataset)
    try:
        fields = config(**options, seed=seed, size=size)
        getattr(fields, "validate", lambda: None)()
        return make(fields)
    except Exception as error:
        text = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "no options"
        raise ValueError(f"task {PREFIX + dataset!r} with {text}: {error or type(error).__name__}") from error


_told: set[tuple[str, type[Exception]]] = set()  # a task, and what its scorer raised


def _tell(name: str, error: Exception) -> None:
    """Say it once of each kind: the texts hold answers, which differ, so they are shown with escapes too."""
    if (name, type(error)) not in _told:
        _told.add((name, type(error)))
        logger.warning("the scorer of task %r raised %.200r: such answers earn 0", name, error)


@functools.lru_cache(8)
def _drawn(dataset: str, options: str, seed: int, count: int) -> list[Row]:
    """The first rows of a data set, made in a process where PYTHONHASHSEED is 0."""
    command = f"from {__name__} import make_rows; make_rows()"
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    request = json.dumps([dataset, options, seed, count])
    child = subprocess.run(
        [sys.executable, "-c", command], input=request, env=environment, capture_output=True, text=True
    )
    try:
        content = json.loads(child.stdout)
    except ValueError:
        content = (child.stderr.strip().splitlines() or ["nothing"])[-1]
    if isinstance(content, str):
        raise ValueError(f"the rows of task {PREFIX + dataset!r} could not be made: {content}")
    return content


def make_rows() -> None:
    """The work of the process that makes rows: a request from standard input, and the rows, or what went wrong, to
    standard output."""
    dataset, options, seed, count = json.load(sys.stdin)
    random.seed(0)  # some data sets draw from the global generator
    content: Any
    try:
        with contextlib.redirect_stdout(sys.stderr):
            made = _made(dataset, json.loads(options), seed=seed * 10 * DRAWS, size=DRAWS)
            content = [_row(made[i], i, entry=ALLOWED[dataset].entry) for i in range(count)]
            task = ReasoningGym(dataset, options=json.loads(options))
            for row in content:
                task.check(task.example(row))
    except Exception as error:
        content = f"{type(error).__name__}: {error}"
    json.dump(content, sys.stdout)


def _row(row: Row, number: int, *, entry: bool) -> Row:
    """A row as text. The metadata are a Python literal: JSON has no tuples, and scorers tell them from lists."""
    metadata = repr(row["metadata"]) if entry else "{}"
    if entry and ast.literal_eval(metadata) != row["metadata"]:
        raise ValueError(f"the metadata of row {number} cannot be kept as text")
    return {"id": number, "question": row["question"], "answer": row["answer"], "metadata": metadata}
