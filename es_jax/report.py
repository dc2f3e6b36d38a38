"""python -m es_jax.report RUN [RUN …] --out=DIR [--mark] [--json]

Writes report.html, a self-contained page, and its figures and tables as files: figures/<name>.png, .pdf and .csv (the
plotted data), tables/<name>.md and .tex. Runs that differ only in their seed are averaged. Unfinished runs are shown as
far as they have come. Runs that cannot be compared, because their data, grader or max_new_tokens differ, are refused;
with --mark they are shown and marked. With --json one line is printed:

    page, figures ({name: {png, pdf, csv}}), tables ({name: {md, tex}}), absent (titles), series ({label: folders}),
    marked ({folder: reason}), results (a row for each series, as in the table)
"""

import argparse
import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from absl import flags

from es_jax.core.flags import arguments_of
from es_jax.plotting import figures as draw
from es_jax.plotting import tables
from es_jax.plotting.figures import Plot
from es_jax.plotting.runs import Row, caption, distinct, group, incomparable, prior_tasks, read_run
from es_jax.plotting.tables import Table

PAGE = "report.html.j2"  # the template is next to the figures
TYPES = {"png": "image/png", "pdf": "application/pdf", "csv": "text/csv", "md": "text/markdown", "tex": "text/x-tex"}


def write_report(workdirs: Sequence[str | Path], out: str | Path, *, mark: bool = False) -> Row:
    """Writes the page, figures and tables about some runs; returns what --json prints.

    Args:
      workdirs: the runs' directories, the most important first.
      out: the folder to write; files of an earlier report are replaced.
      mark: show runs that cannot be compared, with a mark, instead of refusing them.

    Raises:
      FileNotFoundError: a directory is not a run's directory.
      ValueError: runs cannot be compared, a run is given twice, or a file of a run is damaged.
    """
    runs, out = [read_run(folder) for folder in workdirs], Path(out)
    if not runs:
        raise ValueError("no runs are given: name at least one run's directory")
    marks = incomparable(runs)
    if marks and not mark:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in marks.items())
        raise ValueError(
            f"these runs cannot be compared ({reasons}): leave them out, or show them with a mark by --mark"
        )
    series, prior = group(runs, marks), prior_tasks(runs)
    figures = {  # why a figure is absent: the figure, if there are data for it
        "accuracies (no evaluations; set evals.every above 0)": draw.accuracy_over_iterations(series),
        "reward (no reward of a target is other than 0 and 1)": draw.reward_over_iterations(series),
        "target against prior (no prior task was evaluated by all runs)": draw.target_against_prior(series, prior),
        "change in prior accuracy (no prior task was evaluated at step 0 and later)": draw.prior_change(series, prior),
        "causes of the drop (python -m es_jax.evaluate measures them)": draw.drop_parts(series, prior),
        "KL (python -m es_jax.evaluate --kl measures it)": draw.kl_map(series),
        "drift (no finished step)": draw.drift_against_theory(series),
        "λ sweep (it needs two runs that differ only in λ, both with λ above 0)": draw.strength_sweep(series, prior),
    }
    plots, absent = [*filter(None, figures.values())], [name for name, plot in figures.items() if not plot]
    results = tables.results(series, prior)
    accuracies = tables.accuracies(series, distinct([*(run.target for run in runs), *prior]))
    texts = [table for table in (results, accuracies, tables.views(series)) if table]
    kinds: dict[str, Sequence[Plot | Table]] = {"figures": plots, "tables": texts}
    parts = {kind: [(part, part.save(out / kind)) for part in of_kind] for kind, of_kind in kinds.items()}
    labels, settings = {run.folder: one.label for one in series for run in one.runs}, caption(runs)
    sections = {kind: [_section(*pair, settings) for pair in pairs] for kind, pairs in parts.items()}
    loader = jinja2.FileSystemLoader(Path(draw.__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template(PAGE).render(runs=runs, labels=labels, marks=marks, absent=absent, **sections)
    (out / "report.tmp").write_text(page, encoding="utf-8")
    os.replace(out / "report.tmp", out / "report.html")
    return {
        "page": str(out / "report.html"),
        **{
            kind: {part.name: {ending: str(path) for ending, path in paths.items()} for part, paths in pairs}
            for kind, pairs in parts.items()
        },
        "absent": absent,
        "series": {one.label: [str(run.folder) for run in one.runs] for one in series},
        "marked": {str(folder): reason for folder, reason in marks.items()},
        "results": [dict(zip(results.columns, row, strict=True)) for row in results.rows],
    }


def _section(part: Plot | Table, paths: Mapping[str, Path], settings: str) -> Row:
    """A figure or a table; its files become data: URLs, so that the page is self-contained."""
    files = {
        ending: {
            "name": path.name,
            "data": f"data:{TYPES[ending]};base64,{base64.b64encode(path.read_bytes()).decode()}",
        }
        for ending, path in paths.items()
    }
    image = files.pop("png", {}).get("data")
    return part._asdict() | {"caption": f"{part.caption} {settings}", "image": image, "files": list(files.values())}


def main() -> None:
    """Arguments → write_report()."""
    parser = argparse.ArgumentParser("python -m es_jax.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--mark", action="store_true", help="show runs that cannot be compared, with a mark")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.add_argument("--flagfile", help="a file of such arguments, one per line")
    try:
        arguments = parser.parse_args(arguments_of(sys.argv, gnu=True))
    except flags.Error as error:
        sys.exit(f"es_jax.report: {error}")
    try:
        result = write_report(arguments.runs, arguments.out, mark=arguments.mark)
    except (ValueError, OSError) as error:
        if arguments.traceback:
            raise
        sys.exit(f"es_jax.report: {error}")
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['page']}: {len(result['figures'])} figures, {len(result['tables'])} tables")
        for absent in result["absent"]:
            print(f"  not shown: {absent}")


if __name__ == "__main__":
    main()
