"""Figures that compare where runs end: change by target, family and size, KL, λ, and what a drop is made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from es_jax.plotting.curves import ERRORS
from es_jax.plotting.runs import Point, Run, Series, average, together
from es_jax.plotting.style import Plot, bar, canvas, grid, left_label, legend, line, text

DIMENSIONS: Mapping[str, Callable[[Run], str]] = {
    "target": lambda run: run.target,
    "family of the model": lambda run: run.family,
    "size of the model": lambda run: _size(run.size),
}
REASONS = {"format": "format drift", "truncation": "truncation", "knowledge": "knowledge lost"}


def _size(weights: int | None) -> str:
    if weights is None:
        return "unknown"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if weights >= unit:
            return f"{weights / unit:.3g}{name}"
    return str(weights)


def _variants(series: Sequence[Series]) -> dict[str, str]:
    """Series label → method and penalty, with λ where that makes no more than five kinds of boxes."""
    kinds = {one.label: (one.first.method, one.first.penalty, one.first.settings()["λ"]) for one in series}
    few = len(set(kinds.values())) <= 5
    return {
        label: method if penalty == "none" else f"{method} + AWD {penalty}" + (f", λ = {strength:.4g}" if few else "")
        for label, (method, penalty, strength) in kinds.items()
    }


def prior_change(series: Sequence[Series], prior: Sequence[str]) -> Plot | None:
    """Change in accuracy from the base, a value for each run and prior task, as boxes by target, family and size."""
    data: list[dict[str, Any]] = []
    kinds = _variants(series)
    for one in series:
        for run in one.runs:
            for task in prior:
                found = run.accuracy([task])
                if 0 in found and len(found) > 1:
                    end = max(found)
                    row = {name: kind(run) for name, kind in DIMENSIONS.items()}
                    row |= {"run": run.folder.name, "series": one.label, "variant": kinds[one.label]}
                    data.append(row | {"task": task, "step": end, "change": found[end][0] - found[0][0]})
    if not data:
        return None
    variants = list(dict.fromkeys(row["variant"] for row in data))
    figure = canvas(11.0, 4.2)
    for axes, name in zip(figure.subplots(1, len(DIMENSIONS), sharey=True), DIMENSIONS, strict=True):
        _boxes(axes, data, name, variants)
    figure.axes[0].set_ylabel("change in prior accuracy since step 0")
    figure.legend(
        handles=[Patch(label=text(name), **bar(i)) for i, name in enumerate(variants)],
        loc="outside lower center", ncols=min(len(variants), 4), fontsize=8,
    )  # fmt: skip
    says = (
        f"Each box is over runs and the {len(prior)} prior tasks, at each run's last evaluation: quartiles, median "
        f"(line), mean (diamond); whiskers reach the extremes. Prior tasks: {', '.join(prior)}."
    )
    return Plot("prior_change", "Change in prior accuracy", figure, data, says)


def _boxes(axes: Axes, data: Sequence[Mapping[str, Any]], name: str, variants: Sequence[str]) -> None:
    groups = list(dict.fromkeys(row[name] for row in data))
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        for g, group in enumerate(groups):
            values = [row["change"] for row in data if row[name] == group and row["variant"] == variant]
            if values:
                drawn = axes.boxplot(
                    [values], positions=[g + (i - (len(variants) - 1) / 2) * width], widths=0.85 * width, whis=(0, 100),
                    patch_artist=True, showmeans=True, medianprops={"color": "black", "linewidth": 1.6},
                    meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 4},
                )  # fmt: skip
                drawn["boxes"][0].set(**bar(i))
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(groups)), [text(group, width=16) for group in groups], fontsize=8)
    axes.set(xlabel=name, xlim=(-0.6, len(groups) - 0.4))
    axes.grid(alpha=0.3, axis="y")


def kl_map(series: Sequence[Series]) -> Plot | None:
    """Exact KL(base ‖ now) in nats a token, series by tasks, at the last step that all have; None without KL."""
    data: list[dict[str, Any]] = []
    for one in series:
        for task in dict.fromkeys(row["task"] for run in one.runs for row in run.kl):
            by = [{row["step"]: row for row in run.kl if row["task"] == task} for run in one.runs]
            ends = together([mine for mine in by if mine])
            if ends:
                values = [(row["kl_exact"], row.get("kl_exact_se")) for row in ends[max(ends)]]
                point = average(max(ends), values)
                data.append({"series": one.label, "task": task, "step": point.step, "kl": point.mean,
                             "kl_se": point.error, "runs": point.runs})  # fmt: skip
    if not data:
        return None
    names, tasks = (list(dict.fromkeys(row[key] for row in data)) for key in ("series", "task"))
    table = np.full((len(names), len(tasks)), np.nan)
    for row in data:
        table[names.index(row["series"]), tasks.index(row["task"])] = row["kl"]
    figure = canvas(max(3.2 + 1.0 * len(tasks), 6.0), max(1.8 + 0.55 * len(names), 3.2))
    axes, top = figure.subplots(), float(np.nanmax(table))
    image = axes.imshow(table, cmap=colormaps["Greys"].with_extremes(bad="white"), aspect="auto", vmin=0, vmax=top or 1)
    for (i, j), value in np.ndenumerate(table):
        shown = "–" if np.isnan(value) else f"{value:.3g}"
        axes.text(j, i, shown, ha="center", va="center", fontsize=8, color="white" if value > 0.5 * top else "black")
    axes.set_xticks(range(len(tasks)), [text(task, width=14) for task in tasks], rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), [text(name, width=38) for name in names], fontsize=8)
    axes.set(xlabel="prompts of", ylabel="run")
    figure.colorbar(image, label="KL(base ‖ now)\nnats a token")
    says = (
        "Exact KL over the vocabulary on continuations that the base model wrote, mean over prompts, at the last step "
        "at which all runs of a series were measured, not counting runs that never were. "
        + ERRORS
        + " They, the steps and how many runs there are stand in the CSV."
    )
    return Plot("kl", "KL from the base model", figure, data, says)


def strength_sweep(series: Sequence[Series], prior: Sequence[str]) -> Plot | None:
    """Target and mean prior accuracy against λ, beside the base and λ = 0; None if no setting has two λ above 0."""
    sweeps: dict[tuple, list[Series]] = {}
    for one in series:
        if one.last([one.first.target]) and (not prior or one.last(prior)):
            rest = {k: repr(v) for k, v in one.first.settings().items() if k not in ("λ", "optim.anchor.penalty")}
            sweeps.setdefault(tuple(sorted(rest.items())), []).append(one)
    panels = [
        (penalty, mine)
        for mine in sweeps.values()
        for penalty in dict.fromkeys(one.first.penalty for one in mine)
        if penalty != "none" and sum(one.first.penalty == penalty for one in mine) > 1
    ]
    if not panels:
        return None
    figure, spots = grid(len(panels), columns=2, width=5.0, height=3.6)
    data: list[dict[str, Any]] = []
    for axes, (penalty, mine) in zip(spots, panels, strict=True):
        data += _sweep(axes, penalty, mine, prior)
    legend(figure, spots[0], columns=3)
    says = (
        "Dashed: the same runs without a penalty, λ = 0, at the last step of the others, or at the step that it names. "
        "Dotted: the base model. Hollow: at an earlier step than the others. " + ERRORS
        + f" Prior tasks: {', '.join(prior) or 'none'}."
    )  # fmt: skip
    return Plot("strength", "Target and prior accuracy against λ", figure, data, says)


def _sweep(axes: Axes, penalty: str, mine: Sequence[Series], prior: Sequence[str]) -> list[dict[str, Any]]:
    first, data = mine[0].first, []
    swept = sorted((one for one in mine if one.first.penalty == penalty), key=lambda one: one.first.settings()["λ"])
    free = next((one for one in mine if one.first.penalty == "none"), None)
    for i, (name, tasks) in enumerate((("target", [first.target]), ("mean prior", list(prior)))):
        if not tasks:
            continue
        style = line(2 * i)
        ends = [(one.first.settings()["λ"], point) for one in swept if (point := one.last(tasks))]
        x, y = [strength for strength, _ in ends], [point.mean for _, point in ends]
        errors = [np.nan if point.error is None else point.error for _, point in ends]
        axes.errorbar(x, y, errors, label=name, capsize=3, **(style | {"linestyle": "-"}))
        far = max((point.step for _, point in ends), default=0)
        early = [(strength, point.mean) for strength, point in ends if point.step < far]
        hollow = style | {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
        axes.plot([strength for strength, _ in early], [mean for _, mean in early], **hollow)
        data += [_end(first, penalty, name, strength, point) for strength, point in ends]
        if free is not None and (point := free.last(tasks, step=far)):
            axes.axhline(point.mean, color=style["color"], linestyle="--", linewidth=1.2, label=f"{name}, λ = 0")
            if point.step != far:  # beside the line: the legend is of all panels
                where = axes.get_yaxis_transform()
                axes.text(0.01, point.mean, f"step {point.step}", fontsize=7, va="bottom", transform=where)
            data.append(_end(first, "none", name, 0.0, point))
        starts = {r.model: r.accuracy(tasks)[0] for one in mine for r in one.runs if 0 in r.accuracy(tasks)}
        if starts:
            base = average(0, list(starts.values()))
            axes.axhline(base.mean, color=style["color"], linestyle=":", linewidth=1.2, label=f"{name}, base")
            data.append(_end(first, "base", name, 0.0, base))
    many = "" if len({one.first.model for one in mine}) < 2 else f"{first.model}, "
    axes.set_title(text(f"{many}{first.target}, penalty {penalty}", width=60), fontsize=9)
    axes.set(xscale="log", xlabel="strength λ of the penalty", ylim=(-0.03, 1.03))
    strengths = [one.first.settings()["λ"] for one in swept]
    axes.set_xticks(strengths, [f"{strength:.3g}" for strength in strengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    left_label(axes, "held-out accuracy")
    return data


def _end(run: Run, penalty: str, name: str, strength: float, point: Point) -> dict[str, Any]:
    return {"model": run.model, "target": run.target, "penalty": penalty, "lambda": strength, "of": name,
            "step": point.step, "accuracy": point.mean, "accuracy_se": point.error, "runs": point.runs}  # fmt: skip


def _split(run: Run, tasks: Sequence[str]) -> dict[int, list[dict[str, Any]]]:
    """Step → the tasks' evaluations, where the drop of all of them was split."""
    lost = [f"lost_{reason}" for reason in REASONS]
    return {
        step: rows
        for step, rows in run.rows(tasks).items()
        if step and all(name in row for row in rows for name in lost)
    }


def drop_parts(series: Sequence[Series], prior: Sequence[str]) -> Plot | None:
    """What the drop in prior accuracy is made of: lost format, truncation, lost knowledge; None if it was not split."""
    data: list[dict[str, Any]] = []
    for one in series:
        ends = together([split for run in one.runs if (split := _split(run, prior))])
        for reason in REASONS if ends else ():
            values = [(float(np.mean([row[f"lost_{reason}"] for row in rows])), None) for rows in ends[max(ends)]]
            point = average(max(ends), values)
            data.append({"series": one.label, "reason": reason, "step": point.step, "lost": point.mean,
                         "lost_se": point.error, "runs": point.runs})  # fmt: skip
    if not data:
        return None
    names = list(dict.fromkeys(row["series"] for row in data))
    figure = canvas(7.6, 1.6 + 0.75 * len(names))
    axes = figure.subplots()
    for i, reason in enumerate(REASONS):
        mine = [row for row in data if row["reason"] == reason]
        places = [names.index(row["series"]) + (i - 1) * 0.26 for row in mine]
        errors = [np.nan if row["lost_se"] is None else row["lost_se"] for row in mine]
        axes.barh(places, [row["lost"] for row in mine], 0.24, xerr=errors, label=REASONS[reason], capsize=2, **bar(i))
    axes.set_yticks(range(len(names)), [text(name, width=38) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=f"accuracy lost since step 0, mean of {len(prior)} prior task{'s' * (len(prior) != 1)}")
    axes.grid(alpha=0.3, axis="x")
    legend(figure, axes, columns=3)
    says = (
        "A row that was lost is booked under what is wrong with its completion: cut at max_new_tokens, else not in the asked "
        "form, else wrong in good form. Rows that were gained count against it. At the last step at which the drop of "
        "all runs of a series was split, not counting runs where it never was. Errors are over seeds, where there are "
        "several."
    )
    return Plot("drop", "What the drop in prior accuracy is made of", figure, data, says)
