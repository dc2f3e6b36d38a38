"""Implements train.keep_best: the step with the highest held-out metric keeps its checkpoint, and best.json names it.

The rows of evals/<task>.jsonl decide which step that is; of equal ones the earlier wins. Its checkpoint is written
before best.json names it, and the checkpoint of the previous best step is deleted afterwards. So after a kill at any
point a best step is available, and the resumed run finds the same one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from es_jax.core import processes
from es_jax.rundir.best import write_best
from es_jax.rundir.checkpoints import Checkpoints
from es_jax.rundir.metrics import say
from es_jax.scoring.heldout import HeldOut
from es_jax.scoring.row_results import read_evals
from es_jax.training.config import RunConfig


def check_metric(config: RunConfig, tests: list[HeldOut]) -> list[HeldOut]:
    """Returns the held-out rows. Raises ValueError if train.keep_best is the likelihood of options and the task has no
    options."""
    task, metric = config.best_metric or ("", "")
    if metric == "loglik" and any(test.name == task and test.options is None for test in tests):
        raise ValueError(
            f"train.keep_best is {config.train.keep_best!r}, but the task {task!r} has no options to compare: choose "
            "accuracy, strict, robust or reward"
        )
    return tests


class BestStep:
    """The best step so far of a run that is at step `begin`."""

    def __init__(self, config: RunConfig, workdir: Path, checkpoints: Checkpoints, *, begin: int):
        self._config, self._workdir, self._checkpoints = config, workdir, checkpoints
        self._task, self._metric = config.best_metric or ("", "")
        self._facts = self._agreed(begin)
        self._keep()

    def update(self, step: int, save: Callable[[int], None]) -> None:
        """Update the best step after a step's evaluations; `save` writes that step's weights. All processes call it."""
        before, self._facts = self._facts, self._agreed(step)
        if self._facts and self._facts["step"] == step:
            save(step)
        if processes.first():
            write_best(self._workdir, self._facts)
        self._keep()
        if self._facts and self._facts != before:
            say("best step so far: {step}, {metric} {value:.4g} of {task}".format(**self._facts))

    def _keep(self) -> None:
        self._checkpoints.best = None if self._facts is None else self._facts["step"]

    def _agreed(self, step: int) -> dict[str, Any] | None:
        """What best.json holds after that step, as process 0 sees it."""
        if not self._metric:
            return None
        return processes.exchange({0: self._found(step)} if processes.first() else {})[0]

    def _found(self, step: int) -> dict[str, Any] | None:
        """The best of the steps whose weights are available: this one, those with a checkpoint, and those that can be
        replayed."""
        rows = read_evals(self._workdir / "evals" / f"{self._task}.jsonl")
        if not self._config.record.replayable:
            there = {0, step, *self._checkpoints.steps()}
            rows = [row for row in rows if row["step"] in there]
        rows = [row for row in rows if row["step"] <= step and row.get(self._metric) is not None]
        if not rows:
            return None
        best = max(rows, key=lambda row: (row[self._metric], -row["step"]))
        return {"step": best["step"], "task": self._task, "metric": self._metric, "value": best[self._metric]}
