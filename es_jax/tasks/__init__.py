"""Tasks: what a model is trained and tested on. `get_task` makes one by its name; `TASKS` is the table of names."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from es_jax.core.names import unknown
from es_jax.tasks import outside, reasoning_gym
from es_jax.tasks.columns import Columns
from es_jax.tasks.conciseness import Conciseness
from es_jax.tasks.countdown import Countdown
from es_jax.tasks.gsm8k import GSM8K
from es_jax.tasks.json_facts import JsonFacts
from es_jax.tasks.lab import KINDS, Lab
from es_jax.tasks.multiple_choice import DATASETS, MultipleChoice
from es_jax.tasks.proofwriter import ProofWriter
from es_jax.tasks.simple import SimpleTask
from es_jax.tasks.task import Choices, ChoiceTask, Example, Message, Score, Task, check_known, name_of, response_text

__all__ = [
    "TASKS", "ChoiceTask", "Choices", "Example", "Message", "Score", "SimpleTask", "Task", "check_name", "check_task",
    "get_task", "name_and_options", "options_of", "response_text", "source_digest",
]  # fmt: skip

TASKS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {task.name: task for task in (Countdown, GSM8K, ProofWriter, Conciseness, JsonFacts)}
    | {name: partial(MultipleChoice, name) for name in DATASETS}
    | {f"lab-{kind}": partial(Lab, kind) for kind in KINDS}
)


def check_name(name: str) -> None:
    """Checks that the name can be one of a task. A file or a module is not looked at.

    Args:
      name: the name.

    Raises:
      ValueError: it cannot be.
    """
    if reasoning_gym.is_name(name):
        return reasoning_gym.check_name(name)
    if name in TASKS or name == Columns.name or outside.is_reference(name):
        return
    if name not in (points := outside.entry_points()):
        raise ValueError(f"{unknown('task', name, [*TASKS, Columns.name, *points])}; {outside.HOW}")


def get_task(name: str, **options: Any) -> Task:
    """Makes the task of that name with its options.

    Args:
      name: one of the following:

        - a key of `TASKS`;
        - "rows", see `es_jax.tasks.columns.Columns`;
        - "reasoning_gym:NAME", see `es_jax.tasks.reasoning_gym.ReasoningGym`;
        - a name that an installed package registers as an entry point of the group es_jax.tasks;
        - "FILE.py:NAME" or "package.module:NAME", where NAME is a class, a function that returns a task, or a task.
      **options: fields of the task, which its docstring describes.

    Returns:
      The task.

    Raises:
      ValueError: no task has that name, it has no such option, an option's value is wrong, or what the name stands for
        is not a task or raises.
      OSError: the name's file does not exist.

    Examples:
      >>> get_task("countdown", grader="strict")
      Countdown(data_dir=None, seed=0, grader='strict', hub=None)
    """
    make = _maker(name)
    known = _parameters(make)
    for option in options:
        if known is not None:
            check_known(f"option of task {name!r}", option, known)
    if name in TASKS or make is Columns:
        return make(**options)
    try:
        task = make(**options) if callable(make) else make
    except (ValueError, OSError):
        raise
    except Exception as error:
        text = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "no options"
        raise ValueError(f"task {name!r} with {text} raised {type(error).__name__}: {error}") from error
    return check_task(task, f"task {name!r}")


def check_task(task: Any, what: str) -> Task:
    """Returns the task; raises ValueError for anything else, even a class."""
    lacking = [method for method in ("train", "test", "score") if not callable(getattr(task, method, None))]
    if lacking or inspect.isclass(task):
        reason = f"which has no {' and no '.join(lacking)}" if lacking else "a class: call it"
        raise ValueError(
            f"{what} is {task!r}, {reason}: it must be a task, such as an object of a subclass of SimpleTask"
        )
    return task


def options_of(name: str) -> list[str] | None:
    """The options of the task of that name; None if it takes any. Raises as `get_task`."""
    return _parameters(_maker(name))


def name_and_options(task: Task) -> tuple[str, dict[str, Any]]:
    """The name and the options with which `get_task` makes the task again; if they cannot be determined, only a
    descriptive name. Raises ValueError for a name that cannot be a file name."""
    check_task(task, "task")
    if isinstance(task, reasoning_gym.ReasoningGym):
        return task.name_and_options()
    name, options = outside.described(task)
    own = name_of(task)
    if own in (*TASKS, Columns.name) and type(task).__module__.startswith("es_jax."):
        return own, {option: value for option, value in options.items() if option != "kind"}
    if name in TASKS or name == Columns.name:  # a subclass may inherit the name of its base
        return type(task).__name__, {}
    return name, options


def source_digest(task: Task) -> str | None:
    """sha256 of the source of a task from outside the package, or of its function; None for other tasks."""
    return outside.source_digest([type(task), *getattr(task, "functions", ())])


def _maker(name: str) -> Any:
    """The factory of the task of that name, or the task itself."""
    check_name(name)
    if name in TASKS or name == Columns.name:
        return TASKS.get(name, Columns)
    if reasoning_gym.is_name(name):
        return reasoning_gym.maker(name)
    if outside.is_reference(name):
        return outside.load(name)
    try:
        return outside.entry_points()[name].load()
    except Exception as error:
        raise ValueError(f"task {name!r}: its entry point raised {type(error).__name__}: {error}") from error


def _parameters(make: Any) -> list[str] | None:
    if not callable(make) or not inspect.signature(make).parameters:
        return []
    parameters = inspect.signature(make).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if free else list(parameters)
