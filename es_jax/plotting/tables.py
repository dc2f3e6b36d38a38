"""Tables of runs, with standard errors, as Markdown and LaTeX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from es_jax.plotting.runs import ERRORS, Point, Series, Tasks, by_step, distinct, together

LATEX = {sign: "\\" + sign for sign in "{}_%&#$"} | dict(map(str.split, r"""
    \  \textbackslash{}
    ^  \textasciicircum{}
    ~  \textasciitilde{}
    <  \textless{}
    >  \textgreater{}
    ±  $\pm$
    −  $-$
    –  --
    λ  $\lambda$
    σ  $\sigma$
    α  $\alpha$
    θ  $\theta$
    ₀  $_0$
    ‖  $\Vert$
    Δ  $\Delta$
""".strip().splitlines()))  # fmt: skip
MARKDOWN = {"|": "\\|", "<": "&lt;", ">": "&gt;"} | {sign: "\\" + sign for sign in "\\*_`[]"}
VIEWS = {
    "accuracy": "accuracy", "lost_alone": "lost by this grader alone", "strict": "strict", "robust": "robust",
    "loglik": "likeliest", "well_formed": "well-formed", "truncated": "truncated", "mean_length": "tokens",
}  # fmt: skip
FORMS = [".1f" if name == "mean_length" else ".3f" for name in VIEWS]


class Table(NamedTuple):
    """A table of texts."""

    name: str  # name of its files
    title: str  # title of its section
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ERRORS  # how to read it

    def markdown(self) -> str:
        """The table in Markdown; special characters in cells are escaped."""
        head, *rows = self._escaped(MARKDOWN)
        return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))

    def latex(self) -> str:
        """The table in LaTeX (tabular, booktabs); special characters in cells are escaped."""
        head, *rows = (" & ".join(line) + r" \\" for line in self._escaped(LATEX))
        begin = rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}"
        return "\n".join([begin, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""])

    def _escaped(self, signs: dict[str, Any]) -> list[list[str]]:
        """The head and the rows."""
        table = str.maketrans(signs)
        return [[" ".join(cell.split()).translate(table) for cell in line] for line in (self.columns, *self.rows)]

    def save(self, folder: Path) -> dict[str, Path]:
        """Writes name.md and name.tex; returns their paths by suffix."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {ending: folder / f"{self.name}.{ending}" for ending in ("md", "tex")}
        paths["md"].write_text(self.markdown(), encoding="utf-8")
        paths["tex"].write_text(self.latex(), encoding="utf-8")
        return paths


def with_error(point: Point | None) -> str:
    """A mean and its standard error.

    >>> with_error(Point(5, 0.25, 0.0125, 2))
    '0.250 ± 0.013'
    """
    if point is None:
        return "–"
    mean = f"{point.mean:.3f}".replace("-", "−")
    return mean if point.error is None else f"{mean} ± {point.error + 1e-12:.3f}"


def results(series: Sequence[Series], prior: Tasks) -> Table:
    """The results of every series: target and prior accuracy, the target's reward if it is graded, their change, drift
    and its ratio to theory."""
    rows, scores = [], [("target", "accuracy")]
    if any(run.graded for one in series for run in one.runs):
        scores.append(("target's reward", "reward"))
    scores.append(("prior", "accuracy"))
    for one in series:
        target = [one.first.target]
        end = one.last(target)
        points = [
            point(prior if name == "prior" else target, column)
            for name, column in scores
            for point in (one.last, one.change)
        ]
        cells = [_at(end, point) for point in points]
        rows.append((one.label, str(len(one.runs)), str(end.step) if end else "–", *cells, *_drift(one, end)))
    names = [title for name, _ in scores for title in (name, f"Δ {name}")]
    return Table("results", "Results", ("series", "runs", "step", *names, "‖θ − θ₀‖", "measured / theory"), tuple(rows))


def _at(end: Point | None, point: Point | None) -> str:
    """The point with its error, and its step if that is not the row's, since evaluations may be incomplete."""
    return with_error(point) + (f" (step {point.step})" if point and end and point.step != end.step else "")


def _drift(one: Series, end: Point | None) -> tuple[str, str]:
    """Mean drift at the step of the row; without evaluations at the last common step."""
    steps = together([run.drift for run in one.runs])
    rows = steps.get(end.step if end else max(steps, default=0), [])
    ratios = [row["drift"] / row["drift_theory"] for row in rows if row.get("drift_theory")]
    return _mean([row["drift"] for row in rows], ".4g"), _mean(ratios, ".3f")


def accuracies(series: Sequence[Series], tasks: Tasks) -> Table:
    """The accuracy of every task at step 0 and at the last step of each series."""
    rows: list[tuple[str, ...]] = []
    for model, parent in distinct((one.first.model, one.first.parent) for one in series):
        same = (one.runs for one in series if (one.first.model, one.first.parent) == (model, parent))
        runs = next(same)  # from any seed, since all began from the same weights
        starts = [next(filter(None, (run.accuracy([task]).get(0) for run in runs)), None) for task in tasks]
        where = f"{model}, step 0" + (f" ({parent})" if parent else "")
        rows.append((where, *(with_error(start and Point(0, *start, 1)) for start in starts)))
    for one in series:
        ends = [one.last([task]) for task in tasks]
        furthest = max(filter(None, ends), key=lambda end: end.step, default=None)
        rows.append((one.label, *(_at(furthest, end) for end in ends)))
    return Table("accuracies", "Accuracy of each task", ("series", *tasks), tuple(rows))


def views(series: Sequence[Series]) -> Table | None:
    """Each task by every grader at step 0 and at the last step of each series, means over runs; None without a strict
    grader."""
    rows = []
    for one in series:
        for task in distinct(task for run in one.runs for task in run.evals):
            steps = together([by_step(run.evals.get(task, [])) for run in one.runs])
            for step in sorted({min(steps), max(steps)} if steps else ()):
                if all("strict" in row for row in steps[step]):
                    values = ([x for row in steps[step] if (x := row.get(name)) is not None] for name in VIEWS)
                    rows.append((one.label, task, str(step), *map(_mean, values, FORMS)))
    columns = ("series", "task", "step", *VIEWS.values())
    return Table("views", "Each task by every grader", columns, tuple(rows)) if rows else None


def _mean(values: Sequence[float], form: str) -> str:
    return format(np.mean(values), form) if values else "–"
