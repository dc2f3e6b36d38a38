"""What series are called, and what a caption says of runs: both are read from the runs' configs."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from es_jax.plotting.runs import Run, Series

# Dotted field → how a label or a caption calls it. Fields that are not here keep their names.
SYMBOLS = {
    "es.population": "N",
    "es.sigma": "σ",
    "grpo.rollouts": "rollouts",
    "optim.learning_rate": "α",
    "es.rewards": "rewards",
    "es.antithetic": "antithetic",
    "es.noise": "noise",
    "es.shaping": "shaping",
    "optim.name": "optimizer",
    "optim.anchor.source": "anchor",
    "task.grader": "grader",
    "train.steps": "iterations",
}
SKIPPED = ("method", "model.source", "task.name", "optim.anchor.penalty", "λ")  # said in words of their own


def group(runs: Sequence[Run], marks: Mapping[Path, str] | None = None) -> list[Series]:
    """The series of some runs, in the order in which their first runs are given.

    Args:
      runs: any runs.
      marks: folder → why the run cannot be compared; such a run is a series of its own, and its label says so.

    Raises:
      ValueError: two directories hold the same run: everything that a step depends on is equal, the seed included.
    """
    found: dict[tuple, list[Run]] = {}
    marks = marks or {}
    for run in runs:
        key = (*sorted((name, repr(value)) for name, value in run.settings().items()), marks.get(run.folder, ""))
        found.setdefault(key, []).append(run)
    for mine in found.values():
        for one, other in itertools.combinations(mine, 2):
            if one.seed == other.seed:
                raise ValueError(f"{one.folder} and {other.folder} {_same(one, other)}: leave one out; standard errors "
                                 "need runs with different seeds")  # fmt: skip
    everyone = [mine[0] for mine in found.values()]
    label = {id(run): _label(run, everyone, run.folder in marks) for run in everyone}
    return [Series(label[id(mine[0])], tuple(mine)) for mine in found.values()]


def _same(one: Run, other: Run) -> str:
    """How two runs are one run."""
    steps = [run.config.train.steps for run in (one, other)]
    if steps[0] == steps[1]:
        return f"are the same run (seed {seed_of(one)})"
    return f"differ in train.steps alone ({steps[0]} and {steps[1]}, both with seed {seed_of(one)})"


def seed_of(run: Run) -> str:
    """The seed, and that of the task's rows where it is another.

    >>> from es_jax.training.config import freeze
    >>> seed_of(Run(Path("a"), freeze({"train": {"seed": 1}, "task": {"seed": 2}}), {}))
    '1 (task.seed = 2)'
    """
    own, rows = run.seed
    return str(own) if rows in (None, own) else f"{own} (task.seed = {rows})"


def _label(run: Run, everyone: Sequence[Run], marked: bool) -> str:
    """What tells a run from the others: always the method and the anchor, and the fields that vary."""
    words = [
        run.method if run.penalty == "none" else f"{run.method} + AWD {run.penalty}, λ = {_number(run.settings()['λ'])}"
    ]
    same = [other for other in everyone if other.method == run.method]
    if len({other.model for other in everyone}) > 1:
        words.insert(0, run.model)
    if len({other.target for other in everyone}) > 1:
        words.insert(0, run.target)
    settings = [other.settings() for other in same]
    for name, value in run.settings().items():
        values = {repr(other[name]) for other in settings if name in other}
        if value is not None and name not in SKIPPED and len(values) > 1:
            words.append(f"{SYMBOLS.get(name, name)} = {_number(value)}")
    return ", ".join(words) + (" [not comparable]" if marked else "")


def caption(runs: Sequence[Run]) -> str:
    """What the runs of a figure were: model, task, method, N, σ, α, λ and penalty, seeds, iterations, evaluation."""
    parts = [f"Model: {_list(f'{run.model} ({run.size:,} weights)' if run.size else run.model for run in runs)}"]
    parts += [f"trained on: {_list(run.target for run in runs)}"]
    parts += [
        _method(method, [r for r in runs if r.method == method]) for method in dict.fromkeys(r.method for r in runs)
    ]
    strengths = {run.penalty: {other.settings()["λ"] for other in runs if other.penalty == run.penalty} for run in runs}
    parts += ["; ".join(_strength(penalty, values) for penalty, values in strengths.items())]
    parts += [f"seeds {_list(map(seed_of, sorted(runs, key=lambda run: run.config.train.seed)))}", _iterations(runs)]
    ends = [(run.config.decode.max_new_tokens, found[-1]) for run in runs for found in run.evals.values()]
    rows, limits = (f"{row['n']} rows a task" for _, row in ends), (row.get("max_new", own) for own, row in ends)
    graders = _list(run.config.task.grader or "paper" for run in runs)
    parts += [f"evaluated on {_list(rows)}, grader {graders}, max_new_tokens {_list(limits)}"] if ends else []
    return "; ".join(parts) + "."


def _method(name: str, runs: Sequence[Run]) -> str:
    """The method and its own settings."""
    fields = (
        ("optim.learning_rate", "es.population", "es.sigma")
        if name == "ES"
        else ("optim.learning_rate", "grpo.rollouts")
    )
    values = [f"{SYMBOLS[field]} = {_list(run.settings()[field] for run in runs)}" for field in sorted(fields)]
    return f"{name} with {', '.join(values)}"


def _strength(penalty: str, values: set[float]) -> str:
    return "no penalty (λ = 0)" if penalty == "none" else f"penalty {penalty} with λ = {_list(values)}"


def _iterations(runs: Sequence[Run]) -> str:
    """Iterations done, and of the runs that are not finished how far they are."""
    short = [f"{run.folder.name} is at {run.step} of {run.config.train.steps}" for run in runs if not run.finished]
    done = _list(run.config.train.steps for run in runs if run.finished)
    return ", ".join(
        [*([f"{done} iterations"] if done else []), *(["not finished: " + ", ".join(short)] if short else [])]
    )


def _list(values: Any) -> str:
    kept = dict.fromkeys(values)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in kept)
    return ", ".join(_number(value) for value in (sorted(kept) if numbers else kept))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
