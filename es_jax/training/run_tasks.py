"""The tasks of a run, made from its config or given from Python, by their names in the run's files."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_jax.core.names import unknown
from es_jax.rundir.directory import SOURCES
from es_jax.scoring.heldout import HeldOut
from es_jax.tasks import TASKS, get_task, name_and_options, options_of, source_digest
from es_jax.tasks.outside import label
from es_jax.tasks.rows import rows_folder
from es_jax.tasks.task import Example, Task
from es_jax.training import kept_rows
from es_jax.training.config import RunConfig
from es_jax.weights.model import Model

OPTIONS = ("data_dir", "hub", "prompt", "answer", "grader", "seed")  # options of a task that have their own field


def with_task(config: RunConfig, task: Task | str) -> RunConfig:
    """The config with the given task. Raises ValueError if fields are set that only apply to a task given by name."""
    if isinstance(task, str):
        return dataclasses.replace(config, task=dataclasses.replace(config.task, name=task))
    for field in (*OPTIONS, "options"):
        if (value := getattr(config.task, field)) not in (None, {}):
            raise ValueError(
                f"task.{field} is {value!r}, but the task is given as an object: set the value on the object, and the "
                "field back to its default"
            )
    name, options = name_and_options(task)
    return dataclasses.replace(config, task=dataclasses.replace(config.task, name=name, options=options))


def make_task(config: RunConfig) -> Task:
    """The run's task, with the options that are set."""
    name, known = config.task.name, options_of(config.task.name)
    fields = {field: value for field in OPTIONS if (value := getattr(config.task, field)) is not None}
    both = [(f"task.{field}", field, value) for field, value in fields.items()]
    both += [(f"task.options.{option}", option, value) for option, value in config.task.options.items()]
    for field, option, value in both:
        if known is not None and option not in known:
            raise ValueError(f"{field} is {value!r}: {unknown(f'option of task {name!r}', option, known)}")
    if twice := [option for option in config.task.options if option in fields]:
        raise ValueError(f"task.{twice[0]} and task.options.{twice[0]} are both set: keep one of them")
    return get_task(name, **fields, **config.task.options)


def other_task(config: RunConfig, name: str) -> Task:
    """A task of evals.tasks, with its rows from evals.data_dir if that is set and the task takes it."""
    root = config.evals.data_dir
    if root is None or not takes_rows(name):
        return get_task(name)
    return get_task(name, data_dir=rows_folder(root, label(name)))


def takes_rows(name: str) -> bool:
    """Whether the task of that name has an option data_dir."""
    return "data_dir" in (options_of(name) or ())


def by_label(named: Iterable[tuple[str, Task]]) -> dict[str, Task]:
    """Tasks by their names in a run's files; of equal names the later one counts. Raises ValueError if two tasks would
    share a name."""
    names: dict[str, str] = {}
    tasks = {}
    for name, task in named:
        if names.setdefault(label(name), name) != name:
            raise ValueError(
                f"tasks {names[label(name)]!r} and {name!r} would both be named {label(name)!r} in files: rename one"
            )
        tasks[label(name)] = task
    return tasks


def rows_of(task: Task, split: str, n: int, name: str, folders: Sequence[Path] = ()) -> list[Example]:
    """The first `n` rows of a split. If the task's rows are kept, they come from the first folder that has them. Raises
    ValueError if a task does not return them."""
    try:
        rows = kept_rows.rows(task, split, n, label(name), folders)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"the {split} rows of task {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(rows, list) or len(rows) != n or not all(isinstance(row, Example) for row in rows):
        field = "task.train_size" if split == "train" else "evals.rows"
        raise ValueError(
            f"{split}({n}) of task {name!r} must return a list of {n} Examples: correct it, or change {field}"
        )
    return rows


def held_out(
    config: RunConfig,
    tasks: Mapping[str, Task],
    rows: Mapping[str, list[Example]],
    model: Model,
    max_prompt_tokens: int,
) -> list[HeldOut]:
    """The held-out rows of tasks, by their names in files. task.timeout_seconds applies to the trained task and to
    tasks from outside the package."""
    own, limit = label(config.task.name), config.task.timeout_seconds
    return [
        HeldOut.of(
            tasks[name],
            of_task,
            model,
            max_prompt_tokens=max_prompt_tokens,
            label=name,
            timeout_seconds=limit if name == own or name not in TASKS else None,
        )
        for name, of_task in rows.items()
    ]


def source_digests(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The digest of the source of each task from outside the package; config.json keeps them under "task_sources"."""
    digests = {name: digest for name, task in tasks.items() if (digest := source_digest(task))}
    return {SOURCES: digests} if digests else {}
