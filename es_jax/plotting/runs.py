"""The directories of runs, read for figures and tables: half-finished ones too, and those that cannot be compared told.

Runs that differ in their seed, and in nothing else that a step depends on, are a `Series`; a figure shows series, with
standard errors over seeds.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from es_jax.rundir import directory
from es_jax.rundir.metrics import read_jsonl
from es_jax.training.config import RunConfig, read_config

# What may differ within a series: the seed, and what no step depends on.
ALIKE = (
    *("train.", "evals.", "mesh.", "decode.slots", "decode.members_at_once", "decode.max_prompt", "grpo.micro_batch"),
    *("optim.anchor.strength", "optim.anchor.kappa"),  # λ stands for both
)
SCHEDULES = ("es.schedule", "optim.schedule", "optim.anchor.schedule")
NEEDED = {"metrics": ("step",), "drift": ("step",), "kl": ("step", "task", "kl_exact")}  # in every line, by file
EVALUATION = ("step", "accuracy", "n")  # in every line of a task's file


@dataclass(frozen=True)
class Point:
    """A mean at a step: its standard error (None if unknown) and how many runs it is over."""

    step: int
    mean: float
    error: float | None
    runs: int


@dataclass(frozen=True)
class Run:
    """One run's directory. Lists hold rows in the order of their steps.

    Attributes:
      folder: the directory.  config: its fields.  facts: the rest of config.json.
      metrics: rows of metrics.jsonl.  evals: rows of evals/<task>.jsonl by task.  kl: rows of evals/kl.jsonl.
    """

    folder: Path
    config: RunConfig
    facts: Mapping[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evals: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    kl: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    @property
    def target(self) -> str:
        return self.config.task.name

    @property
    def model(self) -> str:
        """The base model's short name."""
        source = self.config.model.source.rstrip("/")
        return Path(source).name.removesuffix(".gguf") or source

    @property
    def family(self) -> str:
        """The letters that the model's name begins with, and a version right behind them: Qwen2.5, Llama, lab."""
        found = re.match(r"[A-Za-z]+[0-9.]*", self.model)
        return found[0].rstrip(".") if found else self.model

    @property
    def size(self) -> int | None:
        """d, how many weights."""
        return self.facts.get("parameters")

    @property
    def method(self) -> str:
        """ "ES" or "GRPO"."""
        return self.config.method.upper()

    @property
    def penalty(self) -> str:
        return self.config.optim.anchor.penalty

    @property
    def seed(self) -> tuple[int, int | None]:
        """train.seed, and task.seed where the task makes its own rows: what differs between the runs of a series."""
        return self.config.train.seed, self.config.task.seed if self.config.task.data_dir is None else None

    def rows(self, tasks: Sequence[str]) -> dict[int, list[dict[str, Any]]]:
        """Step → the evaluations of the tasks, in their order, where all of them were evaluated."""
        return together([{row["step"]: row for row in self.evals.get(task, [])} for task in tasks])

    def accuracy(self, tasks: Sequence[str]) -> dict[int, tuple[float, float | None]]:
        """Step → mean accuracy over tasks and its standard error over rows, where all of them were evaluated."""
        found = {}
        for step, rows in self.rows(tasks).items():
            errors = [error for row in rows if (error := row.get("accuracy_se")) is not None]
            known = math.sqrt(sum(error**2 for error in errors)) / len(rows) if len(errors) == len(rows) else None
            found[step] = (float(np.mean([row["accuracy"] for row in rows])), known)
        return found

    def change(self, tasks: Sequence[str], step: int) -> tuple[float, float | None]:
        """Change in mean accuracy over tasks from step 0, and its standard error: over the same rows, paired.

        Rows of evaluations that did not pair them have the error of two independent means, which is larger.
        """
        found = self.accuracy(tasks)
        (end, end_error), (start, start_error) = found[step], found[0]
        pairs = [row.get("accuracy_change_se") for row in self.rows(tasks)[step]]
        if None not in pairs:
            return end - start, math.hypot(*pairs) / len(pairs)  # type: ignore[arg-type]
        return end - start, None if end_error is None or start_error is None else math.hypot(end_error, start_error)

    def settings(self) -> dict[str, Any]:
        """What the run is, by dotted name, without its seed; λ for the anchor's strength or drift.

        train.steps is among it where a schedule makes every step depend on how many there are.
        """
        made = ("task.seed",) if self.config.task.data_dir is None else ()
        skipped = (*ALIKE, *made, "grpo." if self.config.method == "es" else "es.")
        fields = flatten_dict(dataclasses.asdict(self.config), sep=".")
        flat = {name: value for name, value in fields.items() if not name.startswith(skipped)}
        if any(not fields[name].startswith("constant") for name in SCHEDULES):
            flat["train.steps"] = self.config.train.steps
        return flat | {"λ": self.config.anchor_strength}


@dataclass(frozen=True)
class Series:
    """Runs of one setting with different seeds, under a label that tells them from the other series."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    def curve(self, tasks: Sequence[str]) -> list[Point]:
        """Mean accuracy over tasks at every evaluated step; the error is over seeds, or over rows for a single run."""
        by = [run.accuracy(tasks) for run in self.runs]
        return [average(step, [mine[step] for mine in by if step in mine]) for step in sorted(set().union(*by))]

    def last(self, tasks: Sequence[str], *, step: int | None = None) -> Point | None:
        """The last step of the curve that all runs have; or `step`, where all runs have it."""
        whole = {point.step: point for point in self.curve(tasks) if point.runs == len(self.runs)}
        return whole[step] if step in whole else whole[max(whole)] if whole else None

    def change(self, tasks: Sequence[str]) -> Point | None:
        """Change in mean accuracy from step 0 to the last step that all runs have, with the error of a difference."""
        end = self.last(tasks)
        if end is None or not all(0 in run.accuracy(tasks) for run in self.runs):
            return None
        return average(end.step, [run.change(tasks, end.step) for run in self.runs])


def together(by: Sequence[Mapping[int, Any]]) -> dict[int, list[Any]]:
    """Step → what each has there, at the steps that all have, in order.

    >>> together([{0: "a", 5: "b"}, {5: "c", 9: "d"}])
    {5: ['b', 'c']}
    """
    steps = sorted(set.intersection(*map(set, by))) if by else []
    return {step: [mine[step] for mine in by] for step in steps}


def average(step: int, values: Sequence[tuple[float, float | None]]) -> Point:
    """The mean of (value, its own error) over runs: the error over runs, or the value's own where there is one run.

    >>> average(5, [(0.2, 0.1), (0.4, 0.1)])
    Point(step=5, mean=0.30000000000000004, error=0.1, runs=2)
    """
    numbers = [value for value, _ in values]
    own = values[0][1] if len(values) == 1 else float(np.std(numbers, ddof=1) / math.sqrt(len(numbers)))
    return Point(step, float(np.mean(numbers)), None if own is None else round(own, 12), len(values))


def read_run(folder: str | Path) -> Run:
    """A run's directory, whatever it holds so far.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: a file is damaged; it is named.
    """
    folder = Path(folder)
    facts = directory.read(folder)
    files = {path.stem: _rows(path) for path in sorted((folder / "evals").glob("*.jsonl"))}
    return Run(
        folder,
        read_config(folder),
        facts,
        metrics=_rows(folder / "metrics.jsonl"),
        evals={name: rows for name, rows in files.items() if name not in NEEDED and rows},
        kl=files.get("kl", []),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """A file's rows by step and task; of rows that were written twice the later one."""
    found = {}
    for number, row in enumerate(read_jsonl(path), 1):
        for name in NEEDED.get(path.stem, EVALUATION):
            if not isinstance(row, dict) or row.get(name) is None:
                raise ValueError(
                    f"{path} line {number} has no {name!r}: restore the file, or move it elsewhere if no run wrote it"
                )
        found[row["step"], str(row.get("task", ""))] = row
    return [found[key] for key in sorted(found)]


def prior_tasks(runs: Sequence[Run]) -> list[str]:
    """The tasks that every run evaluated and none was trained on, in the order of the first run's config."""
    common = set.intersection(*(set(run.evals) for run in runs)) - {run.target for run in runs} if runs else set()
    asked = [task for task in runs[0].config.evals.tasks if task in common] if runs else []
    return asked + sorted(common - set(asked))


def incomparable(runs: Sequence[Run]) -> dict[Path, str]:
    """Why a run cannot be set beside the earlier ones: it has other data, another grader or another max_new_tokens.

    Returns:
      folder → the first difference found, for those runs.
    """
    found: dict[Path, str] = {}
    seen: dict[tuple, tuple[Any, Run]] = {}
    for run in runs:
        for name, key, value in _facts(run):
            then, other = seen.setdefault((name, *key), (value, run))
            if then != value and run.folder not in found:
                found[run.folder] = f"{name} is {value!r}, but {then!r} in {other.folder}"
    return found


def _facts(run: Run) -> Iterable[tuple[str, tuple, Any]]:
    """(what is compared, among which runs, its value)."""
    config, digest = run.config, run.facts["digest"]
    yield "decode.max_new", (), config.decode.max_new_tokens
    yield "task.grader", (), config.task.grader or "paper"
    task = config.task
    made = {} if task.data_dir else {task.name: task.seed}  # rows that the task makes differ as the seed does
    data = (task.data_dir, task.seed if task.data_dir else None, task.train_size)
    yield "the training data (data_dir, seed, train_size)", (task.name,), data
    kind = (digest, task.name, made.get(task.name), config.evals.rows, config.evals.tasks)
    yield "digest of the rows", kind, run.facts.get("rows")
    for name, rows in run.evals.items():
        yield f"number of test rows of {name}", (), rows[-1]["n"]
        yield f"max_new_tokens of {name}", (), rows[-1].get("max_new", config.decode.max_new_tokens)
        yield f"digest of the test rows of {name}", (digest, made.get(name), "rows" in rows[-1]), rows[-1].get("rows")
    for row in run.kl:
        sampled = (row.get("rows"), row.get("max_new"), row.get("seed"))
        measured = f"what KL was measured on (rows, max_new_tokens, seed) of {row['task']}"
        yield measured, (digest, made.get(row["task"])), sampled
