"""Reads the directories of runs for figures and tables, averages and labels them, and finds what cannot be compared.

Runs that differ only in their seed form a `Series`; a figure shows series, with standard errors over seeds. Unfinished
runs are read too. Labels and captions are made from the runs' configs.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from es_jax.rundir import directory
from es_jax.rundir.metrics import read_jsonl
from es_jax.tasks.outside import label
from es_jax.training.config import RunConfig, freeze
from es_jax.training.method import METHODS

Row = dict[str, Any]
Rows = list[Row]
Tasks = Sequence[str]  # their names
Value = tuple[float, float | None]  # columns with a standard error, if that is known
ERRORS = "Errors are one standard error: over seeds, or over rows if a series is a single run."
# What may differ within a series: the seed, and fields that no step depends on.
ALIKE = (
    "train.", "evals.", "mesh.", "decode.slots", "decode.members_at_once", "decode.max_prompt_tokens",
    "grpo.micro_batch", "model.template_date", "task.timeout_seconds",
    "optim.anchor.strength", "optim.anchor.kappa",  # λ replaces both
)  # fmt: skip
SCHEDULES = ("es.schedule", "optim.schedule", "optim.anchor.schedule")
# The columns that every line of a file has; other columns belong to the task.
NEEDED = {"metrics": ("step",), "drift": ("step",), "kl": ("step", "task", "kl_exact"), "lm_eval": ("step", "task")}
EARLIER = {"max_new": "max_new_tokens"}  # the name of a column in earlier files → its name
# Dotted field → its name in labels and captions. Other fields keep their names.
SYMBOLS = dict(map(str.split, """
    es.population        N
    es.sigma             σ
    es.rewards           rewards
    es.antithetic        antithetic
    es.noise             noise
    es.shaping           shaping
    grpo.rollouts        rollouts
    optim.name           optimizer
    optim.learning_rate  α
    optim.anchor.source  anchor
    task.grader          grader
    train.steps          iterations
""".strip().splitlines()))  # fmt: skip
CAPTIONED = ("es.population", "es.sigma", "grpo.rollouts", "optim.learning_rate")  # shown with their method
SKIPPED = ("method", "model.source", "task.name", "optim.anchor.penalty", "λ")  # labels describe them in words


class Point(NamedTuple):
    """A mean at a step, its standard error (None if unknown) and the number of runs."""

    step: int
    mean: float
    error: float | None
    runs: int

    def columns(self, name: str) -> Row:
        """The point as columns of a figure's data, with the mean under that name."""
        return {"step": self.step, name: self.mean, f"{name}_se": self.error, "runs": self.runs}


class Run(NamedTuple):
    """One run's directory. Rows are in the order of their steps."""

    folder: Path
    config: RunConfig
    facts: Mapping[str, Any]  # the rest of config.json
    metrics: Rows  # of metrics.jsonl
    evals: dict[str, Rows]  # rows of evals/<task>.jsonl, by task
    kl: Rows  # of evals/kl.jsonl
    target: str  # the trained task
    method: str  # its name in labels: "ES"
    penalty: str
    size: int | None  # d, the number of weights

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    @property
    def parent(self) -> str | None:
        """The step of another run from which it started: "first@40"."""
        parent = self.facts.get("parent")
        return parent and f"{Path(parent['path']).name}@{parent['step']}"

    @property
    def base_digest(self) -> str:
        """The digest of the weights from which it, or its first ancestor, began."""
        return (self.facts.get("parent") or self.facts)["digest"]

    @property
    def base_source(self) -> str:
        """The model from which it, or its first ancestor, began."""
        return (self.facts.get("parent") or {"model": self.config.model.source})["model"]

    @property
    def model(self) -> str:
        """The base model's short name."""
        source = self.base_source.rstrip("/")
        return Path(source).name.removesuffix(".gguf") or source

    @property
    def family(self) -> str:
        """The letters at the start of the model's name and a version right after them: Qwen2.5, Llama, lab."""
        match = re.match(r"[A-Za-z]+[0-9.]*", self.model)
        return match[0].rstrip(".") if match else self.model

    @property
    def strength(self) -> float:
        """λ, whether the config gives λ or κ."""
        return self.config.anchor_strength

    def variant(self, *, strength: bool = True) -> str:
        """Method and penalty, with λ or without it."""
        anchor = f" + AWD {self.penalty}" + (f", λ = {_number(self.strength)}" if strength else "")
        return self.method + ("" if self.penalty == "none" else anchor)

    @property
    def seed(self) -> tuple[int, int | None]:
        """train.seed, and task.seed if the task generates its rows: what differs between the runs of a series."""
        return self.config.train.seed, self.config.task.seed if self.config.task.data_dir is None else None

    @property
    def seed_label(self) -> str:
        """The seed, and the seed of the task's rows if it differs: "1 (task.seed = 2)"."""
        own, rows = self.seed
        return str(own) if rows in (None, own) else f"{own} (task.seed = {rows})"

    @property
    def drift(self) -> dict[int, Row]:
        """Step → its metrics, for steps with a measured drift."""
        return by_step(row for row in self.metrics if row.get("drift") is not None)

    def rows(self, tasks: Tasks) -> dict[int, Rows]:
        """Step → the evaluations of the tasks, in their order, for steps at which all were evaluated."""
        return together([by_step(self.evals.get(task, [])) for task in tasks])

    @property
    def graded(self) -> bool:
        """Whether the target's held-out reward says more than its accuracy: rewards other than 0 and 1."""
        rows = self.evals.get(self.target, [])
        return any(row.get("reward") is not None and abs(row["reward"] - row["accuracy"]) > 1e-6 for row in rows)

    def accuracy(self, tasks: Tasks, column: str = "accuracy") -> dict[int, Value]:
        """Step → mean accuracy over tasks and its standard error over rows, for steps at which all were evaluated; or
        of another column, such as "reward", for steps that have it."""
        return {
            step: (score, _mean_error(rows, f"{column}_se"))
            for step, rows in self.rows(tasks).items()
            if (score := mean(rows, column)) is not None
        }

    def change(self, tasks: Tasks, step: int, column: str = "accuracy") -> Value:
        """Change in mean accuracy over tasks from step 0, and its standard error: over paired rows, or if they were not
        paired over two independent means, which is larger. The same of another column."""
        accuracy = self.accuracy(tasks, column)
        (end, end_error), (start, start_error) = accuracy[step], accuracy[0]
        error = _mean_error(self.rows(tasks)[step], f"{column}_change_se")
        if error is None and end_error is not None and start_error is not None:
            error = math.hypot(end_error, start_error)
        return end - start, error

    def settings(self) -> Row:
        """The settings of the run by dotted name, without its seed; λ stands for the anchor's strength or κ.
        train.steps is included if a schedule makes every step depend on it."""
        fields = flatten_dict(dataclasses.asdict(self.config), sep=".")
        fields = {name: value for name, value in fields.items() if not name.startswith("task.options.")}
        fields["task.options"] = dict(self.config.task.options) or None  # one value: runs may differ in options
        seed = ("task.seed",) if self.config.task.data_dir is None else ()
        skipped = (*ALIKE, *seed, *(f"{name}." for name in METHODS if name != self.config.method))
        settings = {name: value for name, value in fields.items() if not name.startswith(skipped)}
        if any(not fields[name].startswith("constant") for name in SCHEDULES):
            settings["train.steps"] = self.config.train.steps
        return settings | {"λ": self.strength}


class Series(NamedTuple):
    """Runs of one setting with different seeds, under a label that distinguishes them from the other series."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    def curve(self, tasks: Tasks, column: str = "accuracy") -> dict[int, Point]:
        """Step → mean accuracy over tasks, or another column; its error is over seeds, or over rows for a single
        run."""
        runs = [run.accuracy(tasks, column) for run in self.runs]
        return {step: average(step, [run[step] for run in runs if step in run]) for step in sorted(set().union(*runs))}

    def last(self, tasks: Tasks, column: str = "accuracy", *, step: int | None = None) -> Point | None:
        """The last step of the curve that all runs have; or `step`, if all runs have it."""
        whole = {step: point for step, point in self.curve(tasks, column).items() if point.runs == len(self.runs)}
        return whole[step if step in whole else max(whole)] if whole else None

    def change(self, tasks: Tasks, column: str = "accuracy") -> Point | None:
        """Change in mean accuracy, or in another column, from step 0 to the last step that all runs have, with the
        error of a difference."""
        end = self.last(tasks, column)
        if end is None or not all(0 in run.accuracy(tasks, column) for run in self.runs):
            return None
        return average(end.step, [run.change(tasks, end.step, column) for run in self.runs])


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values in order, each once."""
    return list(dict.fromkeys(values))


def by_step(rows: Iterable[Row]) -> dict[int, Row]:
    """Step → its row."""
    return {row["step"]: row for row in rows}


def together(runs: Sequence[Mapping[int, Any]]) -> dict[int, list[Any]]:
    """Step → what each mapping has there, at the common steps, in order.

    >>> together([{0: "a", 5: "b"}, {5: "c", 9: "d"}])
    {5: ['b', 'c']}
    """
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return {step: [run[step] for run in runs] for step in steps}


def average(step: int, values: Sequence[Value]) -> Point:
    """The mean of (value, its own error) over runs, with the error over runs, or the value's own for a single run.

    >>> average(5, [(0.2, 0.1), (0.4, 0.1)])
    Point(step=5, mean=0.30000000000000004, error=0.1, runs=2)
    """
    means = [value for value, _ in values]
    error = values[0][1] if len(values) == 1 else float(np.std(means, ddof=1) / math.sqrt(len(means)))
    return Point(step, float(np.mean(means)), None if error is None else round(error, 12), len(values))


def last_average(runs: Sequence[Mapping[int, Value]]) -> Point | None:
    """The average at the last common step; runs without any step are left out."""
    steps = together([run for run in runs if run])
    return average(max(steps), steps[max(steps)]) if steps else None


def mean(rows: Rows, name: str) -> Any:
    """The mean of a column; None if a row lacks it."""
    values = [row.get(name) for row in rows]
    return None if None in values else float(np.mean(values))  # type: ignore[arg-type]


def _mean_error(rows: Rows, name: str) -> float | None:
    """The standard error of the mean of independent values; None if one of their errors is unknown."""
    errors = [row.get(name) for row in rows]
    return None if None in errors else math.hypot(*errors) / len(errors)  # type: ignore[arg-type]


def read_run(folder: str | Path) -> Run:
    """Reads a run's directory, whatever it holds so far. Raises ValueError that names a damaged file."""
    folder = Path(folder)
    facts = directory.read(folder)
    config = freeze(facts["config"], begun=True)  # paths as given: runs with the same text are alike
    files = {path.stem: _rows(path) for path in sorted((folder / "evals").glob("*.jsonl"))}
    limit = {"max_new_tokens": config.decode.max_new_tokens}  # for evaluations that do not name theirs
    evals = {name: [limit | row for row in rows] for name, rows in files.items() if name not in NEEDED and rows}
    metrics, target = _rows(folder / "metrics.jsonl"), label(config.task.name)
    return Run(
        folder, config, facts, metrics, evals, files.get("kl", []), target=target,
        method=config.method.upper(), penalty=config.optim.anchor.penalty, size=facts.get("parameters"),
    )  # fmt: skip


def _rows(path: Path) -> Rows:
    """A file's rows by step and task; the later one if a row was written twice."""
    rows = {}
    for number, row in enumerate(read_jsonl(path), 1):
        for name in NEEDED.get(path.stem, ("step", "accuracy", "n")):
            if not isinstance(row, dict) or row.get(name) is None:
                raise ValueError(
                    f"{path} line {number} has no {name!r}: restore the file, or move it elsewhere if no run wrote it"
                )
        row = {EARLIER.get(name, name): value for name, value in row.items()}
        rows[row["step"], str(row.get("task", ""))] = row
    return [rows[key] for key in sorted(rows)]


def prior_tasks(runs: Sequence[Run]) -> list[str]:
    """The tasks that every run evaluated and none was trained on, in the order of the first run's config."""
    common = set.intersection(*(set(run.evals) for run in runs)) - {run.target for run in runs}
    return distinct(task for task in (*map(label, runs[0].config.evals.tasks), *sorted(common)) if task in common)


def incomparable(runs: Sequence[Run]) -> dict[Path, str]:
    """Folder → why its run cannot be compared with the earlier ones: the first difference, such as another grader."""
    reasons: dict[Path, str] = {}
    first: dict[tuple, tuple[Any, Run]] = {}
    for run in runs:
        for name, key, value in _compared(run):
            expected, other = first.setdefault((name, *key), (value, run))
            if expected != value:
                days = [one.config.model.template_date for one in (run, other)]
                day = f" (model.template_date is {days[0]!r}, and {days[1]!r} there)" if days[0] != days[1] else ""
                reasons.setdefault(run.folder, f"{name} is {value!r}, but {expected!r} in {other.folder}{day}")
    return reasons


def _compared(run: Run) -> Iterator[tuple[str, tuple, Any]]:
    """(what is compared, among which runs, its value)."""
    config, task, digest = run.config, run.config.task, run.base_digest
    seeds = {} if task.data_dir else {run.target: task.seed}  # generated rows differ with the seed
    data = (task.data_dir, task.seed if task.data_dir else None, task.train_size)
    rows, own = "training_rows" in run.facts, (digest, task.name, seeds.get(run.target))
    # earlier versions have one digest of all rows
    held_out = own if rows else (*own, config.evals.rows, config.evals.tasks)
    yield "decode.max_new_tokens", (), config.decode.max_new_tokens
    yield "task.grader", (), task.grader or "paper"
    yield "the training data (data_dir, seed, train_size)", (task.name,), data
    yield "digest of the rows", held_out, run.facts.get("training_rows" if rows else "rows")
    for name, (*_, row) in run.evals.items():
        yield f"number of test rows of {name}", (), row["n"]
        yield f"max_new_tokens of {name}", (), row["max_new_tokens"]
        yield f"digest of the test rows of {name}", (digest, seeds.get(name), "rows" in row), row.get("rows")
    for row in run.kl:
        sampled = tuple(row.get(name) for name in ("rows", "max_new_tokens", "seed"))
        measured = f"what KL was measured on (rows, max_new_tokens, seed) of {row['task']}"
        yield measured, (digest, seeds.get(row["task"])), sampled


def group(runs: Sequence[Run], marks: Mapping[Path, str] | None = None) -> list[Series]:
    """The series of some runs, in the order of their first runs.

    `marks`: folder → why the run cannot be compared; such a run forms its own series, and its label says so.

    Raises:
      ValueError: two directories hold the same run: all that a step depends on is equal, including the seed.
    """
    groups: dict[tuple, list[Run]] = {}
    marks = marks or {}
    for run in runs:
        same = groups.setdefault((repr(sorted(run.settings().items())), marks.get(run.folder)), [])
        for other in same:
            if other.seed == run.seed:
                before, now = other.config.train.steps, run.config.train.steps
                both = f"differ only in train.steps ({before} and {now}, both with seed {run.seed_label})"
                how = both if before != now else f"are the same run (seed {run.seed_label})"
                raise ValueError(f"{other.folder} and {run.folder} {how}: leave one out; standard errors need runs "
                                 "with different seeds")  # fmt: skip
        same.append(run)
    firsts = [first for first, *_ in groups.values()]
    return [Series(_label(same[0], firsts, same[0].folder in marks), tuple(same)) for same in groups.values()]


def _label(run: Run, others: Sequence[Run], marked: bool) -> str:
    """What distinguishes a run from the others: always the method and the anchor, and the fields that vary."""
    words = [getattr(run, name) for name in ("target", "model") if len({getattr(one, name) for one in others}) > 1]
    words += [f"from {run.parent}"] if run.parent and len({one.parent for one in others}) > 1 else []
    settings = [other.settings() for other in others if other.method == run.method]
    varied = (
        f"{SYMBOLS.get(name, name)} = {_number(value)}"
        for name, value in run.settings().items()
        if value is not None and name not in SKIPPED and len({repr(other.get(name, value)) for other in settings}) > 1
    )
    return ", ".join([*words, run.variant(), *varied]) + (" [not comparable]" if marked else "")


def caption(runs: Sequence[Run]) -> str:
    """Describes the runs of a figure: model, task, method, N, σ, α, λ and penalty, seeds, iterations, evaluation."""
    models = (f"{run.model} ({run.size:,} weights)" if run.size else run.model for run in runs)
    parts = [f"Model: {_list(models)}", f"trained on: {_list(run.target for run in runs)}"]
    parts += [f"{run.folder.name} started from {run.parent}" for run in runs if run.parent]
    for method in distinct(run.method for run in runs):
        settings = [run.settings() for run in runs if run.method == method]
        fields = [name for name in CAPTIONED if name in settings[0]]
        parts.append(f"{method} with " + ", ".join(f"{SYMBOLS[x]} = {_list(s[x] for s in settings)}" for x in fields))
    for penalty in distinct(run.penalty for run in runs):
        strengths = _list(run.strength for run in runs if run.penalty == penalty)
        parts.append("no penalty (λ = 0)" if penalty == "none" else f"penalty {penalty} with λ = {strengths}")
    parts.append(f"seeds {_list(run.seed_label for run in sorted(runs, key=lambda run: run.config.train.seed))}")
    steps = _list(run.config.train.steps for run in runs if run.finished)
    late = ", ".join(f"{x.folder.name} is at {x.step} of {x.config.train.steps}" for x in runs if not x.finished)
    parts.append(", ".join(filter(None, (steps and f"{steps} iterations", late and f"not finished: {late}"))))
    if rows := [rows[-1] for run in runs for rows in run.evals.values()]:
        counts, limits = (f"{row['n']} rows a task" for row in rows), (row["max_new_tokens"] for row in rows)
        graders = _list(run.config.task.grader or "paper" for run in runs)
        parts.append(f"evaluated on {_list(counts)}, grader {graders}, max_new_tokens {_list(limits)}")
    return "; ".join(parts) + "."


def _list(values: Iterable[Any]) -> str:
    once = distinct(values)
    return ", ".join(map(_number, sorted(once) if set(map(type, once)) <= {int, float} else once))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
