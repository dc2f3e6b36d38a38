"""The figures of a report: curves over iterations, and the final results of runs.

Each function first makes rows of data, then draws them. The figures are readable in grey: lines differ in marker, dash
and darkness, and bars in their hatches.
"""

import csv
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from es_jax.core.chunked_map import ceil_div
from es_jax.plotting.runs import (
    ERRORS,
    Point,
    Row,
    Rows,
    Run,
    Series,
    Tasks,
    average,
    distinct,
    last_average,
    mean,
    together,
)

DIMENSIONS = ("target", "family of the model", "size of the model")  # of runs, to group changes into boxes
REASONS = {"format": "format drift", "truncation": "truncation", "knowledge": "knowledge lost"}
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito's
MARKERS = "os^Dv<>PX*"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
FILLS = ("0.92", "0.55", "0.78", "0.35", "0.65")
HATCHES = ("", "///", "...", "xx", "\\\\\\")


class Plot(NamedTuple):
    """A finished figure."""

    name: str  # name of its files
    title: str  # title of its section
    figure: Figure
    data: Rows  # the plotted data, a row for each mark, as in the CSV
    caption: str  # how to read it; the runs' settings are not included

    def save(self, folder: Path) -> dict[str, Path]:
        """Writes name.png, name.pdf and name.csv; returns their paths by suffix."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {ending: folder / f"{self.name}.{ending}" for ending in ("png", "pdf", "csv")}
        self.figure.savefig(paths["png"])
        self.figure.savefig(paths["pdf"], metadata={"CreationDate": None})  # the same data give the same file
        with open(paths["csv"], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, distinct(key for row in self.data for key in row))
            writer.writeheader()
            writer.writerows(self.data)
        return paths


def canvas(width: float, height: float) -> Figure:
    """An empty figure (size in inches) whose parts do not overlap."""
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def line(i: int) -> Row:
    """The style of the i-th line: its colour, marker and dash."""
    return dict(
        color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], linestyle=DASHES[i % len(DASHES)],
        markersize=4.5, linewidth=1.5,
    )  # fmt: skip


def bar(i: int) -> Row:
    """The style of the i-th kind of bar or box: its grey and its hatch."""
    return dict(facecolor=FILLS[i % len(FILLS)], edgecolor="black", hatch=HATCHES[i % len(HATCHES)], linewidth=0.8)


def grid(
    count: int, *, columns: int = 3, width: float = 3.6, height: float = 3.0, sharex: bool = False, ylabel: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels with grid lines; the first panel of each row has the label."""
    across = min(columns, count)
    down = ceil_div(count, across)
    figure = canvas(max(width * across, 6.0), height * down + 0.9)
    panels = figure.subplots(down, across, squeeze=False, sharex=sharex, sharey=True).ravel().tolist()
    for i, axes in enumerate(panels):
        axes.grid(alpha=0.3)
        axes.set(visible=i < count, ylabel="" if i % across else ylabel)
    return figure, panels[:count]


def text(words: str, *, width: int = 34) -> str:
    """Text from configs and files for a figure: wrapped, printable, and never parsed as mathematics."""
    clean = "".join(c if c.isprintable() else "?" for c in words).replace("$", r"\$")
    return textwrap.fill(clean.replace(" = ", "\u00a0=\u00a0"), width)  # keeps λ = 2 on one line


def ticks(set_ticks: Callable, names: Sequence[str], *, width: int, **style: Any) -> None:
    """Names along one axis."""
    set_ticks(range(len(names)), [text(name, width=width) for name in names], fontsize=8, **style)


def legend(figure: Figure, axes: Axes, *, columns: int, width: int = 40) -> None:
    """The legend of one panel, below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [text(label, width=width) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)) or 1, fontsize=8)


def accuracy_over_iterations(series: Sequence[Series]) -> Plot | None:
    """Held-out accuracy of each task over iterations, one panel per series; None if nothing was evaluated."""
    series = [one for one in series if any(run.evals for run in one.runs)]
    if not series:
        return None
    runs = [run for one in series for run in one.runs]
    evaluated = {task for run in runs for task in run.evals}
    tasks = distinct(task for run in runs for task in (run.target, *run.evals) if task in evaluated)
    figure, panels = grid(len(series), ylabel="held-out accuracy")
    data: Rows = []
    for axes, one in zip(panels, series, strict=True):
        for i, task in enumerate(tasks):
            rows = [{"series": one.label, "task": task} | x.columns("accuracy") for x in one.curve([task]).values()]
            style = line(i) | ({"linewidth": 2.8} if task == one.first.target else {})
            x, y = _columns(rows, "step", "accuracy")
            axes.plot(x, y, label=task, markevery=max(len(x) // 12, 1), **style)
            if known := [row for row in rows if row["accuracy_se"] is not None]:
                steps, mean, error = map(np.array, _columns(known, "step", "accuracy", "accuracy_se"))
                axes.fill_between(steps, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)
            data += rows
        axes.set_title(text(one.label), fontsize=9)
        axes.set(xlabel="iteration", ylim=(-0.03, 1.03))
    legend(figure, panels[0], columns=5)
    caption = f"Held-out accuracy of each task; the thick line is the task that is trained on. {ERRORS}"
    return Plot("accuracy", "Accuracy of each task over iterations", figure, data, caption)


def reward_over_iterations(series: Sequence[Series]) -> Plot | None:
    """Held-out reward of the target over iterations, one line per series; None if every reward is 0 or 1, which the
    accuracy shows."""
    series = [one for one in series if any(run.graded for run in one.runs)]
    if not series:
        return None
    figure = canvas(6.4, 4.2)
    axes, data = figure.subplots(), []
    for i, one in enumerate(series):
        rows = [
            {"series": one.label, "task": one.first.target} | point.columns("reward")
            for point in one.curve([one.first.target], "reward").values()
        ]
        steps, mean, error = _columns(rows, "step", "reward", "reward_se")
        axes.errorbar(steps, mean, [x or 0.0 for x in error], label=one.label, capsize=2, **line(i))
        data += rows
    axes.set(xlabel="iteration", ylabel="held-out reward of the target")
    axes.grid(alpha=0.3)
    legend(figure, axes, columns=2)
    caption = f"Reward of the unperturbed model on held-out rows of the task that is trained on. {ERRORS}"
    return Plot("reward", "Reward of the target over iterations", figure, data, caption)


def target_against_prior(series: Sequence[Series], prior: Tasks) -> Plot | None:
    """Target accuracy against mean accuracy on the prior tasks: one panel for each target and model, one line per
    series, points coloured by iteration. None if there are no prior tasks, or none was evaluated."""
    groups: dict[tuple, list] = {}
    for one in series:
        curves = [one.curve(tasks) for tasks in ([one.first.target], prior)]
        if all(curves):
            groups.setdefault((one.first.target, one.first.model), []).append((one.label, curves))
    if not groups:
        return None
    figure, panels = grid(len(groups), width=5.2, height=4.0, columns=2, sharex=True)
    last = max(1, *(max(curves[0]) for group in groups.values() for _, curves in group))
    data: Rows = []
    for axes, ((target, model), group) in zip(panels, groups.items(), strict=True):
        samples: list[Line2D] = []
        for label, curves in group:
            rows = [
                {"series": label, "step": step, "target": a.mean, "target_se": a.error, "prior": b.mean,
                 "prior_se": b.error, "runs": a.runs}
                for step, (a, b) in together(curves).items()
            ]  # fmt: skip
            data += rows
            x, y, steps = _columns(rows, "target", "prior", "step")
            style = line(len(samples))
            path = {"color": "0.6", "linewidth": 1, "linestyle": style["linestyle"]}
            axes.plot(x, y, zorder=1, **path)
            points = axes.scatter(
                x, y, c=steps, cmap="viridis", vmin=0, vmax=last, s=34, marker=style["marker"],
                edgecolors="black", linewidths=0.6, zorder=2,
            )  # fmt: skip
            samples.append(Line2D(  # white, since a colour would stand for an iteration
                [], [], **path, marker=style["marker"], markersize=6, markerfacecolor="white", markeredgecolor="black",
                label=text(label, width=44),
            ))  # fmt: skip
        axes.set(
            xlabel=text(f"accuracy on the target, {target}", width=60),
            ylabel=f"mean accuracy on {len(prior)} prior task{'s' * (len(prior) != 1)}",
        )
        axes.tick_params(labelbottom=True)
        if len(groups) > 1:
            axes.set_title(text(model), fontsize=9)
        axes.legend(
            handles=samples, fontsize=7, ncols=1 if len(samples) < 4 else 2, loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
        )  # fmt: skip
    figure.colorbar(points, ax=panels, label="iteration", shrink=1 / ceil_div(len(panels), 2), aspect=25)
    caption = f"Up and right is better: the target learnt, the rest kept. Prior tasks: {', '.join(prior)}."
    return Plot("target_against_prior", "Target against prior accuracy", figure, data, caption)


def drift_against_theory(series: Sequence[Series]) -> Plot | None:
    """Measured ‖θ − θ₀‖ and its closed form over iterations, and their ratio if any run has a closed form; None if no
    step is finished."""
    drifts = [(one.label, _drift(one)) for one in series if any(run.metrics for run in one.runs)]
    if not drifts:
        return None
    data = [row for _, rows in drifts for row in rows]
    theories = any(row["theory"] for row in data)
    figure = canvas(7.2, 6.0 if theories else 4.2)
    panels = figure.subplots(1 + theories, 1, sharex=True, height_ratios=(3, 2)[: 1 + theories], squeeze=False)[:, 0]
    for i, (label, rows) in enumerate(drifts):
        style, every = line(i), max(len(rows) // 15, 1)
        steps, drift = _columns(rows, "step", "drift")
        panels[0].plot(steps, drift, label=label, markevery=every, **(style | {"linestyle": "none"}))
        if predicted := [row for row in rows if row["theory"]]:
            steps, theory, ratio = _columns(predicted, "step", "theory", "ratio")
            panels[0].plot(steps, theory, color=style["color"], linewidth=1.2)
            panels[1].plot(steps, ratio, markevery=every, **(style | {"linewidth": 1.0}))
    if theories:
        panels[1].axhspan(0.98, 1.02, color="0.85", zorder=0)
        panels[1].axhline(1, color="0.4", linewidth=0.8)
        low, high = panels[1].get_ylim()
        panels[1].set(ylim=(min(low, 0.96), max(high, 1.04)), ylabel="measured / theory")
    panels[0].set_ylabel("‖θ − θ₀‖ (Euclidean norm)")
    panels[-1].set_xlabel("iteration")
    for axes in panels:
        axes.grid(alpha=0.3)
    legend(figure, panels[0], columns=2)
    began = "".join(f" {one.label} began at {_parents(one)}." for one in series if any(run.parent for run in one.runs))
    return Plot(
        "drift", "Drift against theory", figure, data,
        f"Markers show the measured distance of the weights from where they began, as the mean over seeds.{began} "
        "Lines show the closed form in exact arithmetic, where one exists. A ratio outside the grey band, 1 ± 0.02, "
        "means that precision was lost.",
    )  # fmt: skip


def _parents(one: Series) -> str:
    return ", ".join(distinct(run.parent or "the base model" for run in one.runs))


def _drift(one: Series) -> Rows:
    """Means of measured and predicted drift, at the steps common to all started runs of a series."""
    rows = []
    for step, metrics in together([run.drift for run in one.runs if run.metrics]).items():
        drift, theory = mean(metrics, "drift"), mean(metrics, "drift_theory")
        ratio = drift / theory if theory else None
        row = {"series": one.label, "step": step, "drift": drift, "theory": theory, "ratio": ratio}
        rows.append(row | {"from": _parents(one)})
    return rows


def prior_change(series: Sequence[Series], prior: Tasks) -> Plot | None:
    """Change in accuracy from the base as boxes by target, family and size, with a value for each run and prior
    task."""
    few = len({one.first.variant() for one in series}) <= 5  # kinds of boxes, with λ
    data = [
        {
            "target": run.target, "family of the model": run.family, "size of the model": _size(run.size),
            "run": run.folder.name, "series": one.label, "variant": run.variant(strength=few), "task": task,
            "step": (end := max(accuracy)), "change": accuracy[end][0] - accuracy[0][0],
        }
        for one in series for run in one.runs for task in prior
        if 0 in (accuracy := run.accuracy([task])) and len(accuracy) > 1
    ]  # fmt: skip
    if not data:
        return None
    names = distinct(row["variant"] for row in data)
    figure = canvas(11.0, 4.2)
    width = 0.8 / len(names)
    for axes, dimension in zip(figure.subplots(1, len(DIMENSIONS), sharey=True), DIMENSIONS, strict=True):
        groups = distinct(row[dimension] for row in data)
        for i, name in enumerate(names):
            rows = [row for row in data if row["variant"] == name]
            axes.boxplot(
                [[row["change"] for row in rows if row[dimension] == x] for x in groups], label=name,
                positions=np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width, widths=0.85 * width,
                whis=(0, 100), patch_artist=True, showmeans=True, boxprops=bar(i),
                medianprops={"color": "black", "linewidth": 1.6},
                meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 4},
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
        ticks(axes.set_xticks, groups, width=16)
        axes.set(xlabel=dimension, xlim=(-0.6, len(groups) - 0.4))
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("change in prior accuracy since step 0")
    legend(figure, axes, columns=4, width=34)
    return Plot(
        "prior_change", "Change in prior accuracy", figure, data,
        f"Each box covers runs and the {len(prior)} prior tasks, at each run's last evaluation. It shows the "
        "quartiles, the median (line) and the mean (diamond); whiskers reach the extremes. Prior tasks: "
        f"{', '.join(prior)}.",
    )  # fmt: skip


def _size(weights: int | None) -> str:
    if weights is None:
        return "unknown"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if weights >= unit:
            return f"{weights / unit:.3g}{name}"
    return f"{weights:.3g}"


def kl_map(series: Sequence[Series]) -> Plot | None:
    """Exact KL(base ‖ now) in nats per token, by series and task, at the last common step; None without KL."""
    data: Rows = []
    for one in series:
        for task in distinct(row["task"] for run in one.runs for row in run.kl):
            kl = [
                {row["step"]: (row["kl_exact"], row.get("kl_exact_se")) for row in run.kl if row["task"] == task}
                for run in one.runs
            ]
            if point := last_average(kl):
                data.append({"series": one.label, "task": task} | point.columns("kl"))
    if not data:
        return None
    names, tasks = (distinct(row[key] for row in data) for key in ("series", "task"))
    values = {(row["series"], row["task"]): row["kl"] for row in data}
    table = np.array([[values.get((name, task), np.nan) for task in tasks] for name in names])
    figure = canvas(max(3.2 + 1.0 * len(tasks), 6.0), max(1.8 + 0.55 * len(names), 3.2))
    axes, top = figure.subplots(), float(np.nanmax(table))
    image = axes.imshow(table, cmap=colormaps["Greys"].with_extremes(bad="white"), aspect="auto", vmin=0, vmax=top or 1)
    for (i, j), value in np.ndenumerate(table):
        label = "–" if np.isnan(value) else f"{value:.3g}"
        axes.text(j, i, label, ha="center", va="center", fontsize=8, color="white" if value > 0.5 * top else "black")
    ticks(axes.set_xticks, tasks, width=14, rotation=30, ha="right")
    ticks(axes.set_yticks, names, width=38)
    axes.set(xlabel="prompts of", ylabel="run")
    figure.colorbar(image, label="KL(base ‖ now)\nnats a token")
    return Plot(
        "kl", "KL from the base model", figure, data,
        "Exact KL over the vocabulary on continuations that the base model wrote, as the mean over prompts. It is "
        "taken at the last step at which all runs of a series were measured; runs that were never measured are left "
        f"out. {ERRORS} The CSV lists the errors, the steps and the number of runs.",
    )  # fmt: skip


def drop_parts(series: Sequence[Series], prior: Tasks) -> Plot | None:
    """The causes of the drop in prior accuracy: lost format, truncation, lost knowledge; None if it was not split."""
    data = [
        {"series": one.label, "reason": reason} | point.columns("lost")
        for one in series
        for reason in REASONS
        if (point := last_average([_lost(run, prior, reason) for run in one.runs]))
    ]
    if not data:
        return None
    names = distinct(row["series"] for row in data)
    figure = canvas(7.6, 1.6 + 0.75 * len(names))
    axes = figure.subplots()
    for i, (reason, label) in enumerate(REASONS.items()):
        lost, errors = _columns([row for row in data if row["reason"] == reason], "lost", "lost_se")
        y = np.arange(len(names)) + (i - 1) * 0.26
        axes.barh(y, lost, 0.24, xerr=np.array(errors, float), label=label, capsize=2, **bar(i))
    ticks(axes.set_yticks, names, width=38)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=f"accuracy lost since step 0, mean of {len(prior)} prior task{'s' * (len(prior) != 1)}")
    axes.grid(alpha=0.3, axis="x")
    legend(figure, axes, columns=3)
    return Plot(
        "drop", "Causes of the drop in prior accuracy", figure, data,
        "A lost row is counted under what is wrong with its completion: cut at max_new_tokens, else not in the asked "
        "form, else wrong in good form. Gained rows count negatively. The step is the last one at which the drop was "
        "split for all runs of a series; runs in which it was never split are left out. With several seeds, errors "
        "are over seeds.",
    )  # fmt: skip


def _lost(run: Run, tasks: Tasks, reason: str) -> dict[int, tuple[float, None]]:
    """Step → mean accuracy lost for the reason, at steps where the drop was split for all tasks."""
    return {
        step: (mean(rows, f"lost_{reason}"), None)
        for step, rows in run.rows(tasks).items()
        if step and all(f"lost_{name}" in row for row in rows for name in REASONS)
    }


def strength_sweep(series: Sequence[Series], prior: Tasks) -> Plot | None:
    """Target and mean prior accuracy against λ, with the base and λ = 0; None if no setting has two λ above 0."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        if one.last([one.first.target]) and (not prior or one.last(prior)):
            settings = one.first.settings() | {"λ": None, "optim.anchor.penalty": None}
            groups.setdefault(repr(sorted(settings.items())), []).append(one)
    counts = ((group, Counter(one.first.penalty for one in group)) for group in groups.values())
    sweeps = [(x, group) for group, count in counts for x in count if x != "none" and count[x] > 1]
    if not sweeps:
        return None
    figure, panels = grid(len(sweeps), columns=2, width=5.0, height=3.6, ylabel="held-out accuracy")
    data = [row for axes, sweep in zip(panels, sweeps, strict=True) for row in _sweep(axes, *sweep, prior)]
    legend(figure, panels[0], columns=3)
    return Plot(
        "strength", "Target and prior accuracy against λ", figure, data,
        "The dashed line is the same runs without a penalty, λ = 0, at the last step of the others or at the step "
        "named next to it. The dotted line is the base model. Hollow markers are at an earlier step than the others. "
        f"{ERRORS} Prior tasks: {', '.join(prior) or 'none'}.",
    )  # fmt: skip


def _sweep(axes: Axes, penalty: str, group: Sequence[Series], prior: Tasks) -> Rows:
    first = group[0].first
    anchored = sorted((one for one in group if one.first.penalty == penalty), key=lambda one: one.first.strength)
    free = next((one for one in group if one.first.penalty == "none"), None)
    data: Rows = []

    def add(penalty: str, name: str, strength: float, point: Point) -> Row:
        columns = {"model": first.model, "target": first.target, "penalty": penalty, "lambda": strength, "of": name}
        data.append(columns | point.columns("accuracy"))
        return data[-1]

    for i, (name, tasks) in enumerate((("target", [first.target]), ("mean prior", prior))[: 2 if prior else 1]):
        style = line(2 * i)
        rows = [add(penalty, name, one.first.strength, point) for one in anchored if (point := one.last(tasks))]
        x, y, errors = _columns(rows, "lambda", "accuracy", "accuracy_se")
        axes.errorbar(x, y, np.array(errors, float), label=name, capsize=3, **(style | {"linestyle": "-"}))
        last = max((row["step"] for row in rows), default=0)
        hollow = style | {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
        axes.plot(*_columns([row for row in rows if row["step"] < last], "lambda", "accuracy"), **hollow)
        if free is not None and (point := free.last(tasks, step=last)):
            axes.axhline(point.mean, color=style["color"], linestyle="--", linewidth=1.2, label=f"{name}, λ = 0")
            if point.step != last:  # next to the line, since the legend covers all panels
                across = axes.get_yaxis_transform()
                axes.text(0.01, point.mean, f"step {point.step}", fontsize=7, va="bottom", transform=across)
            add("none", name, 0.0, point)
        if starts := {run.model: start for one in group for run in one.runs if (start := run.accuracy(tasks).get(0))}:
            base = average(0, list(starts.values()))
            axes.axhline(base.mean, color=style["color"], linestyle=":", linewidth=1.2, label=f"{name}, base")
            add("base", name, 0.0, base)
    axes.set_title(text(f"{first.target}, penalty {penalty}", width=60), fontsize=9)
    axes.set(xscale="log", xlabel="strength λ of the penalty", ylim=(-0.03, 1.03))
    strengths = [one.first.strength for one in anchored]
    axes.set_xticks(strengths, [f"{strength:.3g}" for strength in strengths])
    axes.minorticks_off()
    return data


def _columns(rows: Rows, *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]
