"""Tasks: what a model is trained and tested on. `get_task` makes one by its name; `TASKS` is the table."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any

from es_jax.tasks.conciseness import Conciseness
from es_jax.tasks.countdown import Countdown
from es_jax.tasks.gsm8k import GSM8K
from es_jax.tasks.lab import KINDS, Lab
from es_jax.tasks.multiple_choice import DATASETS, MultipleChoice
from es_jax.tasks.proofwriter import ProofWriter
from es_jax.tasks.task import Choices, ChoiceTask, Example, Message, Score, Task, check_known, response_text

__all__ = [
    "TASKS", "ChoiceTask", "Choices", "Example", "Message", "Score", "Task", "get_task", "response_text",
]  # fmt: skip

TASKS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {task.name: task for task in (Countdown, GSM8K, ProofWriter, Conciseness)}
    | {name: partial(MultipleChoice, name) for name in DATASETS}
    | {f"lab-{kind}": partial(Lab, kind) for kind in KINDS}
)


def get_task(name: str, **options: Any) -> Task:
    """The task of that name, made with its options.

    Args:
      name: a key of `TASKS`.
      **options: fields of the task, which its docstring describes.

    Raises:
      ValueError: no task has that name, it has no such option, or an option's value is wrong.

    >>> get_task("countdown", grader="strict")
    Countdown(data_dir=None, seed=0, grader='strict')
    """
    check_known("task", name, TASKS)
    for option in options:
        check_known(f"option of task {name!r}", option, signature(TASKS[name]).parameters)
    return TASKS[name](**options)
