"""Tables of runs, with standard errors, as Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from es_jax.plotting.runs import Point, Series, together

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "−": "$-$", "–": "--", "λ": r"$\lambda$", "σ": r"$\sigma$", "α": r"$\alpha$", "θ": r"$\theta$",
    "₀": r"$_0$", "‖": r"$\Vert$", "Δ": r"$\Delta$",
}  # fmt: skip
MARKDOWN = {
    "\\": "\\\\",
    "|": "\\|",
    "<": "&lt;",
    ">": "&gt;",
    "*": "\\*",
    "_": "\\_",
    "`": "\\`",
    "[": "\\[",
    "]": "\\]",
}


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
      name: of its files.  title: of its section.  columns: the head.  rows: the cells, a tuple a row.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table; cells are text, whatever they hold."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        cells = [lines[0], *lines[2:]]
        shown = [tuple(_escape(cell, MARKDOWN) for cell in line) for line in cells]
        return "\n".join("| " + " | ".join(line) + " |" for line in (shown[0], lines[1], *shown[1:])) + "\n"

    def latex(self) -> str:
        """As a tabular environment of booktabs; cells are text, whatever they hold."""
        head, *rest = [" & ".join(_escape(c, LATEX) for c in line) + r" \\" for line in (self.columns, *self.rows)]
        form = "l" + "r" * (len(self.columns) - 1)
        body = "\n".join([r"\toprule", head, r"\midrule", *rest, r"\bottomrule"])
        return f"\\begin{{tabular}}{{{form}}}\n{body}\n\\end{{tabular}}\n"


def _escape(cell: str, signs: dict[str, str]) -> str:
    return "".join(signs.get(c, c) for c in " ".join(cell.split()))


def with_error(point: Point | None, digits: int = 3) -> str:
    """A mean and its standard error.

    >>> with_error(Point(5, 0.25, 0.0125, 2))
    '0.250 ± 0.013'
    """
    if point is None:
        return "–"
    mean = f"{point.mean:.{digits}f}".replace("-", "−")
    return mean if point.error is None else f"{mean} ± {point.error + 1e-12:.{digits}f}"


def results(series: Sequence[Series], prior: Sequence[str]) -> Table:
    """Where every series stands: target and prior accuracy, their change, drift and its ratio to theory."""
    rows = []
    for one in series:
        target = [one.first.target]
        end = one.last(target)
        rows.append(
            (
                one.label,
                str(len(one.runs)),
                str(end.step) if end else "–",
                with_error(end),
                with_error(one.change(target)),
                _at(end, one.last(prior)) if prior else "–",
                _at(end, one.change(prior)) if prior else "–",
                *_drift(one, end),
            )
        )
    head = ("series", "runs", "step", "target", "Δ target", "prior", "Δ prior", "‖θ − θ₀‖", "measured / theory")
    return Table("results", "Results", head, tuple(rows))


def _at(end: Point | None, point: Point | None) -> str:
    """The point with its error, and its step where that is not the row's: evaluations may be half done."""
    return with_error(point) + (f" (step {point.step})" if point and end and point.step != end.step else "")


def _drift(one: Series, end: Point | None) -> tuple[str, str]:
    """Mean drift at the step of the row, or without evaluations at the last step that all runs have."""
    by = together([{row["step"]: row for row in run.metrics if row.get("drift") is not None} for run in one.runs])
    rows = by.get(end.step if end else max(by, default=0))
    if rows is None:
        return "–", "–"
    ratios = [row["drift"] / row["drift_theory"] for row in rows if row.get("drift_theory")]
    return f"{np.mean([row['drift'] for row in rows]):.4g}", f"{np.mean(ratios):.3f}" if ratios else "–"


def accuracies(series: Sequence[Series], tasks: Sequence[str]) -> Table:
    """The accuracy of every task: at step 0, and where each series stands."""
    rows = []
    bases: dict[str, Series] = {}
    for one in series:
        bases.setdefault(one.first.model, one)
    for model, one in bases.items():
        starts = [next((p for p in one.curve([task]) if p.step == 0), None) for task in tasks]
        rows.append(
            (f"{model}, step 0", *(with_error(_rows_only(one, task, p)) for task, p in zip(tasks, starts, strict=True)))
        )
    for one in series:
        ends = [one.last([task]) for task in tasks]
        furthest = max((end for end in ends if end), key=lambda end: end.step, default=None)
        rows.append((one.label, *(_at(furthest, end) for end in ends)))
    return Table("accuracies", "Accuracy of each task", ("series", *tasks), tuple(rows))


def _rows_only(one: Series, task: str, point: Point | None) -> Point | None:
    """The base model is the same for all seeds: its error is over rows."""
    if point is None:
        return None
    found = next(x for run in one.runs if 0 in (x := run.accuracy([task])))
    return Point(0, found[0][0], found[0][1], 1)


VIEWS = {
    "accuracy": "accuracy", "strict": "strict", "loglik": "likeliest", "well_formed": "well-formed",
    "truncated": "truncated", "mean_length": "tokens",
}  # fmt: skip


def views(series: Sequence[Series]) -> Table | None:
    """Each task by every view at step 0 and where each series stands, means over runs; None without a strict view."""
    rows = []
    for one in series:
        for task in dict.fromkeys(task for run in one.runs for task in run.evals):
            by = together([{row["step"]: row for row in run.evals.get(task, [])} for run in one.runs])
            for step in dict.fromkeys((*list(by)[:1], *list(by)[-1:])):
                if all("strict" in row for row in by[step]):
                    rows.append((one.label, task, str(step), *(_mean(by[step], name) for name in VIEWS)))
    head = ("series", "task", "step", *VIEWS.values())
    return Table("views", "Each task by every view", head, tuple(rows)) if rows else None


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{np.mean(values):.1f}" if name == "mean_length" and values else f"{np.mean(values):.3f}" if values else "–"
