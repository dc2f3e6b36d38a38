"""Rows of tasks that are generated once and kept in DIR/tasks/<task>.<split>.jsonl: a first line that describes them,
then one line for each row. Such a task has a method `kept_as`, which returns what its rows depend on."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from es_jax.core import processes
from es_jax.rundir.directory import write_text
from es_jax.tasks.task import Example, Task

logger = logging.getLogger(__name__)
FOLDER = "tasks"


def rows(task: Task, split: str, n: int, name: str, folders: Sequence[Path]) -> list[Example]:
    """The first `n` rows of a split of the task that files call `name`. They are read from the first folder that keeps
    that many, or else generated. Of several processes the first reads or generates them for all.

    Raises ValueError if a file is damaged, and whatever the task raises.
    """
    if not hasattr(task, "kept_as"):
        return getattr(task, split)(n)
    content = [_content(one) for one in _first(task, split, n, name, folders)] if processes.first() else []
    return [_example(row) for row in processes.exchange({0: content} if processes.first() else {})[0]]


def keep(task: Task, split: str, name: str, examples: Sequence[Example], folders: Sequence[Path]) -> None:
    """Write the rows to the last of the folders, if their task keeps rows and no folder has that many. The first
    process writes."""
    if not hasattr(task, "kept_as") or not processes.first():
        return
    paths = [folder / f"{name}.{split}.jsonl" for folder in folders]
    if not any(len(_read(path, task, warn=False) or ()) >= len(examples) for path in paths):
        lines = "".join(json.dumps(_content(example)) + "\n" for example in examples)
        header = {**task.kept_as(), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
        write_text(paths[-1], json.dumps(header) + "\n" + lines)


def _first(task: Any, split: str, n: int, name: str, folders: Sequence[Path]) -> list[Example]:
    kept = [there for folder in folders if (there := _read(folder / f"{name}.{split}.jsonl", task))]
    for there in kept:
        if len(there) >= n:
            return there[:n]
    made = getattr(task, split)(n)
    for there in kept:
        if there != made[: len(there)]:
            logger.warning(
                "task %s: of %d %s rows only %d are kept, and the rows generated now differ from these",
                name, n, split, len(there),
            )  # fmt: skip
    return made


def _read(path: Path, task: Any, *, warn: bool = True) -> list[Example] | None:
    """The rows of a file; None if there is no file, or if its rows are those of a task with other options."""
    if not path.exists():
        return None
    try:
        first, _, lines = path.read_text(encoding="utf-8").partition("\n")
        header = json.loads(first)
        examples = [_example(json.loads(line)) for line in lines.splitlines()]
        sha256 = header.pop("sha256")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore it, or delete it to generate new rows") from None
    if header != json.loads(json.dumps(task.kept_as())):
        return None
    if warn and sha256 != hashlib.sha256(lines.encode()).hexdigest():
        logger.warning("%s does not match its sha256, so it was changed: its rows are used as they are now", path)
    return examples


def _content(example: Example) -> dict[str, Any]:
    return {**dataclasses.asdict(example), "meta": dict(example.meta)}


def _example(row: dict[str, Any]) -> Example:
    prompt = row["prompt"]
    return Example(row["id"], prompt if isinstance(prompt, str) else tuple(prompt), row["answer"], row["meta"])
