"""Figures from the directories of runs: one function a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from es_jax.training.evalsfile import read_evals


def accuracies(workdir: str | Path, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and held-out accuracies [n] of a task, from a run's evals/<task>.jsonl.

    Raises:
      FileNotFoundError: the run has no evaluation of the task.
    """
    path = Path(workdir) / "evals" / f"{task}.jsonl"
    rows = read_evals(path)
    if not rows:
        raise FileNotFoundError(f"{path} has no rows: run with evals.every above 0 and {task!r} in evals.tasks")
    return np.array([row["step"] for row in rows]), np.array([row["accuracy"] for row in rows])


def prior_accuracy(workdir: str | Path, prior: Sequence[str]) -> np.ndarray:
    """Mean held-out accuracy of the prior tasks at every evaluated step, [n]."""
    return np.mean([accuracies(workdir, task)[1] for task in prior], axis=0)


def target_against_prior(
    runs: Mapping[str, str | Path], path: str | Path, *, target: str, prior: Sequence[str]
) -> Path:
    """Target accuracy against mean prior accuracy, a line a run, its points coloured by iteration.

    Args:
      runs: label → run directory.
      path: of the image; its ending chooses the format.
      target, prior: names of tasks that all runs evaluated.

    Returns:
      The path.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes, points = figure.subplots(), None
    last = max(accuracies(run, target)[0][-1] for run in runs.values())
    for marker, (label, run) in zip("os^Dv", runs.items(), strict=False):
        steps, x = accuracies(run, target)
        y = prior_accuracy(run, prior)
        axes.plot(x, y, color="0.75", linewidth=1, zorder=1)
        points = axes.scatter(
            x, y, c=steps, cmap="viridis", vmin=0, vmax=last, marker=marker, label=label, edgecolors="0.2", zorder=2
        )
    axes.set(xlabel=f"accuracy on the target, {target}", ylabel=f"mean accuracy on {len(prior)} prior tasks")
    axes.set_ylim(0, 1.03)
    axes.set_xlim(left=0)
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    assert points is not None
    figure.colorbar(points, label="iteration")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return Path(path)
