"""python -m es_jax.report RUN [RUN …] --out=DIR [--mark] [--json]

One page, report.html, that opens from disk and needs nothing beside it, and its figures and tables as files:
figures/<name>.png, .pdf and .csv (what was drawn), tables/<name>.md and .tex. Runs that differ in their seed, and in
nothing else that a step depends on, are averaged. Runs that are not finished are shown as far as they are. Runs that
cannot be compared, because they have other data, another grader or another max_new_tokens, are refused; with --mark they are
shown and marked. With --json one line is printed:

    page, figures ({name: {png, pdf, csv}}), tables ({name: {md, tex}}), absent (titles), series ({label: folders}),
    marked ({folder: reason}), results (a row a series, as in the table)
"""

import argparse
import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from es_jax.plotting import comparisons, curves, tables
from es_jax.plotting.labels import caption, group, seed_of
from es_jax.plotting.runs import Run, Series, incomparable, prior_tasks, read_run
from es_jax.plotting.style import Plot, save
from es_jax.plotting.tables import Table

TYPES = {"png": "image/png", "pdf": "application/pdf", "csv": "text/csv", "md": "text/markdown", "tex": "text/x-tex"}


def write_report(workdirs: Sequence[str | Path], out: str | Path, *, mark: bool = False) -> dict[str, Any]:
    """Writes the page, figures and tables of some runs; returns what --json prints.

    Args:
      workdirs: the runs' directories, the most important first.
      out: the folder to write; files of an earlier report are replaced.
      mark: show runs that cannot be compared, marked, instead of refusing them.

    Raises:
      FileNotFoundError: a directory holds no run.
      ValueError: runs cannot be compared, one is given twice, or a file of one is damaged.
    """
    runs, out = [read_run(folder) for folder in workdirs], Path(out)
    if not runs:
        raise ValueError("no runs are given: name at least one run's directory")
    marks = incomparable(runs)
    if marks and not mark:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in marks.items())
        raise ValueError(f"these runs cannot be compared ({reasons}): leave them out, or show them marked with --mark")
    series, prior = group(runs, marks), prior_tasks(runs)
    plots, absent = _plots(series, prior)
    saved = {plot.name: save(plot, out / "figures") for plot in plots}
    made = _tables(series, prior, runs)
    written = {table.name: _write_table(table, out / "tables") for table in made}
    text = caption(runs)
    figures = [_figure(plot, saved[plot.name], text) for plot in plots]
    shown = [vars(x) | {"caption": f"{curves.ERRORS} {text}", "files": _links(written[x.name])} for x in made]
    page = _page(runs, series, marks, figures=figures, tables=shown, absent=absent)
    (out / "report.tmp").write_text(page, encoding="utf-8")
    os.replace(out / "report.tmp", out / "report.html")
    files = lambda kinds: {n: {k: str(path) for k, path in paths.items()} for n, paths in kinds.items()}  # noqa: E731
    return {
        "page": str(out / "report.html"),
        "figures": files(saved),
        "tables": files(written),
        "absent": absent,
        "series": {one.label: [str(run.folder) for run in one.runs] for one in series},
        "marked": {str(folder): reason for folder, reason in marks.items()},
        "results": [dict(zip(made[0].columns, row, strict=True)) for row in made[0].rows],
    }


def _plots(series: Sequence[Series], prior: Sequence[str]) -> tuple[list[Plot], list[str]]:
    """The figures there are data for, and why others are absent."""
    wanted = {
        "accuracies (no evaluations: evals.every above 0)": curves.accuracy_over_iterations(series),
        "target against prior (no prior task that all runs evaluated)": curves.target_against_prior(series, prior),
        "change in prior accuracy (none evaluated at step 0 and later)": comparisons.prior_change(series, prior),
        "what the drop is made of (python -m es_jax.evaluate measures it)": comparisons.drop_parts(series, prior),
        "KL (python -m es_jax.evaluate --kl measures it)": comparisons.kl_map(series),
        "drift (no finished step)": curves.drift_against_theory(series),
        "λ sweep (it needs two λ above 0 that differ in nothing else)": comparisons.strength_sweep(series, prior),
    }
    return [p for p in wanted.values() if p is not None], [name for name, plot in wanted.items() if plot is None]


def _tables(series: Sequence[Series], prior: Sequence[str], runs: Sequence[Run]) -> list[Table]:
    targets = dict.fromkeys(run.target for run in runs)
    made = (tables.results(series, prior), tables.accuracies(series, [*targets, *prior]), tables.views(series))
    return [table for table in made if table is not None]


def _write_table(table: Table, folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {ending: folder / f"{table.name}.{ending}" for ending in ("md", "tex")}
    paths["md"].write_text(table.markdown(), encoding="utf-8")
    paths["tex"].write_text(table.latex(), encoding="utf-8")
    return paths


def _data(path: Path) -> str:
    """A file as a data: address, so that the page needs nothing beside it."""
    return f"data:{TYPES[path.suffix[1:]]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _links(paths: Mapping[str, Path]) -> list[dict[str, str]]:
    return [{"name": path.name, "data": _data(path)} for path in paths.values()]


def _figure(plot: Plot, paths: dict[str, Path], text: str) -> dict[str, Any]:
    files = {ending: path for ending, path in paths.items() if ending != "png"}
    return {
        "name": plot.name,
        "title": plot.title,
        "caption": f"{plot.says} {text}",
        "image": _data(paths["png"]),
        "files": _links(files),
    }


def _page(runs: Sequence[Run], series: Sequence[Series], marks: Mapping[Path, str], **parts: Any) -> str:
    import jinja2

    source = resources.files("es_jax.plotting").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    label = {run.folder: one.label for one in series for run in one.runs}
    return template.render(
        title=f"Report of {len(runs)} run{'' if len(runs) == 1 else 's'}",
        marks=[(str(folder), reason) for folder, reason in marks.items()],
        unfinished=[f"{run.folder} ({run.step} of {run.config.train.steps})" for run in runs if not run.finished],
        runs=[_line(run, label[run.folder]) for run in runs],
        **parts,
    )


def _line(run: Run, label: str) -> dict[str, Any]:
    versions = run.facts.get("versions") or {}
    return {
        "folder": run.folder, "series": label, "seed": seed_of(run), "step": run.step,
        "steps": run.config.train.steps, "model": run.config.model.source, "digest": str(run.facts["digest"])[:12],
        "weights": f"{run.size:,}" if run.size else "unknown", "git": str(versions.get("git"))[:10],
        "es_jax": versions.get("es_jax"), "jax": versions.get("jax"),
    }  # fmt: skip


def main() -> None:
    """Arguments → write_report()."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m es_jax.report", description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--mark", action="store_true", help="show runs that cannot be compared, marked")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    given = parser.parse_args()
    try:
        result = write_report(given.runs, given.out, mark=given.mark)
    except (ValueError, OSError) as error:
        if given.traceback:
            raise
        sys.exit(f"es_jax.report: {error}")
    if given.json:
        print(json.dumps(result))
    else:
        print(f"{result['page']}: {len(result['figures'])} figures, {len(result['tables'])} tables")
        for absent in result["absent"]:
            print(f"  not shown: {absent}")


if __name__ == "__main__":
    main()
