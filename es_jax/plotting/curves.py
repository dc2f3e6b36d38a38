"""Figures over iterations: accuracies, target against prior, drift against theory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from es_jax.plotting.runs import Point, Run, Series, together
from es_jax.plotting.style import DASHES, MARKERS, Plot, band, canvas, grid, left_label, legend, line, text

ERRORS = "Errors are one standard error: over seeds, or over rows where a series is a single run."


def accuracy_over_iterations(series: Sequence[Series]) -> Plot | None:
    """Held-out accuracy of each task over iterations, a panel a series; None if nothing was evaluated."""
    series = [one for one in series if any(run.evals for run in one.runs)]
    if not series:
        return None
    tasks = list(dict.fromkeys(task for one in series for run in one.runs for task in (run.target, *run.evals)))
    tasks = [task for task in tasks if any(task in run.evals for one in series for run in one.runs)]
    figure, panels = grid(len(series))
    data: list[dict[str, Any]] = []
    for axes, one in zip(panels, series, strict=True):
        for i, task in enumerate(tasks):
            points = one.curve([task])
            _curve(axes, points, i, label=task, thick=task == one.first.target)
            data += [_row(one, task, point) for point in points]
        axes.set_title(text(one.label), fontsize=9)
        axes.set(xlabel="iteration", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
        left_label(axes, "held-out accuracy")
    legend(figure, panels[0], columns=5)
    says = "Held-out accuracy of each task; the thick line is the task that is trained on. " + ERRORS
    return Plot("accuracy", "Accuracy of each task over iterations", figure, data, says)


def _curve(axes: Axes, points: Sequence[Point], i: int, *, label: str, thick: bool = False) -> None:
    x, y = [point.step for point in points], [point.mean for point in points]
    style = line(i) | ({"linewidth": 2.8} if thick else {})
    axes.plot(x, y, label=label, markevery=max(len(x) // 12, 1), **style)
    band(axes, x, y, [point.error for point in points], style["color"])


def _row(one: Series, task: str, point: Point) -> dict[str, Any]:
    return {"series": one.label, "task": task, "step": point.step, "accuracy": point.mean, "accuracy_se": point.error,
            "runs": point.runs}  # fmt: skip


def target_against_prior(series: Sequence[Series], prior: Sequence[str]) -> Plot | None:
    """Target accuracy against mean prior accuracy, a line a series, its points coloured by iteration.

    Args:
      series: what to show, a panel for each target and model.
      prior: the tasks whose mean is the prior accuracy. None is returned where there are none.
    """
    paths = [(one, one.curve([one.first.target]), one.curve(prior)) for one in series] if prior else []
    paths = [path for path in paths if path[1] and path[2]]
    if not paths:
        return None
    kinds = list(dict.fromkeys((one.first.target, one.first.model) for one, _, _ in paths))
    figure, panels = grid(len(kinds), width=5.2, height=4.0, columns=2, sharex=True)
    last, points = max(path[1][-1].step for path in paths), None
    data: list[dict[str, Any]] = []
    for axes, (target, model) in zip(panels, kinds, strict=True):
        mine = [path for path in paths if (path[0].first.target, path[0].first.model) == (target, model)]
        for i, (one, x, y) in enumerate(mine):
            by = {point.step: point for point in y}
            both = [(point, by[point.step]) for point in x if point.step in by]
            across, up = [a.mean for a, _ in both], [b.mean for _, b in both]
            axes.plot(across, up, color="0.6", linewidth=1, linestyle=DASHES[i % len(DASHES)], zorder=1)
            points = axes.scatter(
                across, up, c=[a.step for a, _ in both], cmap="viridis", vmin=0, vmax=max(last, 1), s=34,
                marker=MARKERS[i % len(MARKERS)], edgecolors="black", linewidths=0.6, zorder=2,
            )  # fmt: skip
            data += [
                {"series": one.label, "step": a.step, "target": a.mean, "target_se": a.error, "prior": b.mean,
                 "prior_se": b.error, "runs": a.runs}
                for a, b in both
            ]  # fmt: skip
        axes.set(xlabel=text(f"accuracy on the target, {target}", width=60))
        axes.tick_params(labelbottom=True)
        axes.set_ylabel(f"mean accuracy on {len(prior)} prior task{'s' * (len(prior) != 1)}")
        if len(kinds) > 1:
            axes.set_title(text(model), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(
            [_key(i) for i in range(len(mine))], [text(one.label, width=44) for one, _, _ in mine], fontsize=7,
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1 if len(mine) < 4 else 2,
        )  # fmt: skip
    assert points is not None
    figure.colorbar(points, ax=panels, label="iteration", shrink=1 / -(-len(panels) // 2), aspect=25)
    says = f"Up and right is better: the target learnt, the rest kept. Prior tasks: {', '.join(prior)}."
    return Plot("target_against_prior", "Target against prior accuracy", figure, data, says)


def _key(i: int) -> Line2D:
    """A legend's sample of the i-th path: its marker and dash, without a colour, which is the iteration's."""
    return Line2D(
        [], [], color="0.6", linewidth=1, linestyle=DASHES[i % len(DASHES)], marker=MARKERS[i % len(MARKERS)],
        markerfacecolor="white", markeredgecolor="black", markersize=6,
    )  # fmt: skip


def drift_against_theory(series: Sequence[Series]) -> Plot | None:
    """Measured ‖θ − θ₀‖ and its closed form over iterations, and their ratio where any run has a closed form.

    None where no step is finished.
    """
    series = [one for one in series if any(run.metrics for run in one.runs)]
    if not series:
        return None
    walks = [_drift(one.runs) for one in series]
    known = any(theory for _, _, predicted in walks for theory in predicted)
    figure = canvas(7.2, 6.0 if known else 4.2)
    panels = figure.subplots(2 if known else 1, 1, sharex=True, height_ratios=(3, 2)[: 1 + known], squeeze=False)[:, 0]
    data: list[dict[str, Any]] = []
    for i, (one, (steps, measured, theory)) in enumerate(zip(series, walks, strict=True)):
        style, every = line(i), max(len(steps) // 15, 1)
        panels[0].plot(steps, measured, label=one.label, markevery=every, **(style | {"linestyle": "none"}))
        where = [(step, m, t) for step, m, t in zip(steps, measured, theory, strict=True) if t]
        if where:
            at, ratio = [step for step, _, _ in where], [m / t for _, m, t in where]
            panels[0].plot(at, [t for _, _, t in where], color=style["color"], linewidth=1.2)
            panels[1].plot(at, ratio, markevery=every, **(style | {"linewidth": 1.0}))
        data += [
            {"series": one.label, "step": step, "drift": m, "theory": t, "ratio": m / t if t else None}
            for step, m, t in zip(steps, measured, theory, strict=True)
        ]
    if known:
        _band_of_ratio(panels[1])
    panels[0].set_ylabel("‖θ − θ₀‖ (Euclidean norm)")
    panels[-1].set_xlabel("iteration")
    for axes in panels:
        axes.grid(alpha=0.3)
    legend(figure, panels[0], columns=2)
    says = (
        "Markers: the measured distance of the weights from where they began, mean over seeds. Lines: the closed form "
        "in exact arithmetic, where there is one. A ratio outside the grey band, 1 ± 0.02, means that precision was "
        "lost."
    )
    return Plot("drift", "Drift against theory", figure, data, says)


def _band_of_ratio(axes: Axes) -> None:
    axes.axhspan(0.98, 1.02, color="0.85", zorder=0)
    axes.axhline(1, color="0.4", linewidth=0.8)
    low, high = axes.get_ylim()
    axes.set(ylim=(min(low, 0.96), max(high, 1.04)), ylabel="measured / theory")


def _drift(runs: Sequence[Run]) -> tuple[list[int], list[float], list[float | None]]:
    """Steps that all runs of a series have, and the means of measured and predicted drift there."""
    by = [{row["step"]: row for row in run.metrics if row.get("drift") is not None} for run in runs if run.metrics]
    found = together(by)
    measured = [float(np.mean([row["drift"] for row in rows])) for rows in found.values()]
    theory: list[float | None] = []
    for rows in found.values():
        known = [t for row in rows if (t := row.get("drift_theory")) is not None]
        theory.append(float(np.mean(known)) if len(known) == len(rows) else None)
    return list(found), measured, theory
