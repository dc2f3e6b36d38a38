"""Figures and tables about runs, from their directories. `python -m es_jax.report` makes a page of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from es_jax.core.extras import require

require("report")

from es_jax.plotting import figures  # noqa: E402 - where matplotlib is not installed, the line above says so
from es_jax.plotting.runs import Run, Series, read_run  # noqa: E402

__all__ = ["Run", "Series", "accuracies", "prior_accuracy", "read_run", "target_against_prior"]


def accuracies(workdir: str | Path, *tasks: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] at which all of the tasks were evaluated, and their mean held-out accuracies [n].

    Raises FileNotFoundError if there is no such step.
    """
    accuracy = read_run(workdir).accuracy(tasks)
    if not accuracy:
        raise FileNotFoundError(
            f"{workdir}/evals has no step at which all of {', '.join(tasks)} were evaluated: run with evals.every "
            "above 0 and these tasks in evals.tasks"
        )
    return np.array(list(accuracy)), np.array([value for value, _ in accuracy.values()])


def prior_accuracy(workdir: str | Path, prior: Sequence[str]) -> np.ndarray:
    """Mean held-out accuracy of the prior tasks, [n], at the steps of `accuracies(workdir, *prior)`."""
    return accuracies(workdir, *prior)[1]


def target_against_prior(runs: Mapping[str, str | Path], path: str | Path, *, prior: Sequence[str]) -> Path:
    """Writes a figure of target accuracy against mean prior accuracy, one line for each run, coloured by iteration.

    Args:
      runs: label → run directory.
      path: path of the image, which is returned; its suffix selects the format.
      prior: names of tasks that all runs evaluated.

    Raises:
      ValueError: no run has evaluated its target and the prior tasks.
    """
    plot = figures.target_against_prior([Series(label, (read_run(run),)) for label, run in runs.items()], prior)
    if plot is None:
        raise ValueError(
            f"no run has evaluations of its target and of {', '.join(prior)}, so nothing can be drawn: run with "
            "evals.every above 0 and these tasks in evals.tasks"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    plot.figure.savefig(path)
    return Path(path)
