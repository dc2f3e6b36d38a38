"""python -m es_jax.sweep --config=FILE[:args] --over "FIELD=VALUE,VALUE,…" ["FIELD=VALUE,…" …] --out=DIR [--list]

Runs every point of a grid: every combination of the values of some fields, each in DIR/<fields and values>. The points
run one after another in this process, which reuses compiled programs; or as a job array, where --index=K runs point K,
counted from 0. All points are checked before the first one starts. After an interruption the same command continues and
skips finished points. If a point fails, the others still run; the failure is reported at the end, with exit status 1.

  --index=$SLURM_ARRAY_TASK_ID        for an array in SLURM (sbatch --array=0-5)
  --index=$JOB_COMPLETION_INDEX       for an indexed job in Kubernetes

At the end it writes DIR/sweep.csv and sweep.json, with a row for each point, and DIR/report about all runs. After a job
array, the same command without --index writes them. See docs/sweep.md. With --json one line is printed:

    points (rows: point, the fields, state, step, reward, accuracy, accuracy_se, drift, error), report (the page, or
    null), absent (why there is no report, or null)
"""

import csv
import io
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from es_jax.core.extras import missing
from es_jax.core.flags import command, define_config, parser
from es_jax.core.text_table import aligned


def main(argv: list[str]) -> None:
    """Flags → points → run_points() → summary."""
    with command("es_jax.sweep", argv[:1]) as values:
        from es_jax.core import processes
        from es_jax.training.grid import make_points, state

        points = make_points(values.config, [*(values.over or ()), *argv[1:]], values.out)
        if values.index is not None and values.index >= len(points):
            last = len(points) - 1
            raise ValueError(
                f"--index is {values.index}, but the {len(points)} points have the numbers 0 to {last}: choose one "
                "from --list"
            )
        if values.list:
            rows = [{"index": i, "point": point.name, "state": state(point)} for i, point in enumerate(points)]
            print(json.dumps(rows) if values.json else _table(rows))
            return
        chosen = points if values.index is None else [points[values.index]]
        try:
            failed = run_points(chosen, values.out, details=values.traceback)
        except KeyboardInterrupt:
            sys.exit("es_jax.sweep: interrupted; the same command continues from the last finished step")
        except processes.Preempted as stop:
            processes.leave(f"es_jax.sweep: {stop}")
        if values.index is None:
            result = summary(points, values.out, failed)
            print(json.dumps(result) if values.json else _words(result, values.out))
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        sys.exit(f"es_jax.sweep: {len(failed)} of {len(chosen)} points failed: {reasons}")


def run_points(points: Sequence[Any], out: str | Path, *, details: bool = False) -> dict[str, str]:
    """Runs the unfinished points one after another, with one cache of compiled programs in out/cache.

    Args:
      points: the points that `es_jax.training.grid.make_points` returns, or some of them.
      out: the folder given to `make_points`.
      details: show the tracebacks of errors.

    Returns:
      name of a failed point → reason.

    Raises:
      ValueError: a point's folder has a run with another config. Nothing is started then.
      processes.Preempted: SIGTERM came; the point's last finished step has a checkpoint.
    """
    from es_jax.core import processes
    from es_jax.rundir.directory import compilation_cache
    from es_jax.rundir.metrics import say
    from es_jax.training.grid import DONE, check_folders, state
    from es_jax.training.loop import run

    check_folders(points)
    failed = {}
    with compilation_cache(Path(out) / "cache"):
        for number, point in enumerate(points, 1):
            before = state(point)
            say(f"point {number} of {len(points)}, {point.name}: {before}")
            if before == DONE:
                continue
            try:
                run(point.config, point.folder)
            except processes.Preempted:
                raise
            except Exception as error:  # the other points still run
                failed[point.name] = _sentence(error)
                if details or not isinstance(error, ValueError | OSError):
                    traceback.print_exception(error)
                say(f"point {number} of {len(points)}, {point.name}: failed: {failed[point.name]}")
    return failed


def _sentence(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    if "RESOURCE_EXHAUSTED" in text:
        return f"out of memory ({text}): lower decode.slots, decode.max_new_tokens or decode.members_at_once"
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def summary(points: Sequence[Any], out: str | Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """Writes out/sweep.csv, out/sweep.json and, with matplotlib, out/report; returns what --json prints.

    `failed` is what `run_points` returned.
    """
    from es_jax.rundir.directory import write_json, writing
    from es_jax.training.grid import row

    rows = [row(point, failed.get(point.name)) for point in points]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    begun = [point.folder for point, one in zip(points, rows, strict=True) if one["step"]]
    page, absent = None, missing("report")
    if not absent and not begun:
        absent = "no point has a finished step"
    elif not absent:
        from es_jax.report import write_report

        try:
            page = write_report(begun, Path(out) / "report", mark=True)["page"]
        except (ValueError, OSError) as error:
            absent = str(error)
    result = {"points": rows, "report": page, "absent": absent}
    write_json(Path(out) / "sweep.json", result, indent=2)
    with writing(Path(out) / "sweep.csv"):
        (Path(out) / "sweep.csv").write_text(text.getvalue(), encoding="utf-8")
    return result


def _words(result: Mapping[str, Any], out: str) -> str:
    columns = ("point", "state", "reward", "accuracy", "drift")
    table = _table([{name: row[name] for name in columns} for row in result["points"]])
    report = result["report"] or f"no report: {result['absent']}"
    return f"{table}\n{Path(out) / 'sweep.csv'}; {report}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(aligned(cells))


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def entry() -> None:
    """Define the flags, and run `main` with them."""
    from es_jax.training.config import FIELDS

    define_config(FIELDS)
    flags.DEFINE_multi_string("over", None, "A field and its values, FIELD=VALUE,VALUE,…; more may follow")
    flags.DEFINE_string("out", None, "The folder for the runs, their table and report; a sweep in it continues.")
    flags.DEFINE_integer("index", None, "Run only this point, counted from 0, as a job of an array.", lower_bound=0)
    flags.DEFINE_bool("list", False, "Print the points and their progress; run nothing.")
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")
    app.run(main, flags_parser=parser("es_jax.sweep", required=("config", "out"), fields=FIELDS))


if __name__ == "__main__":
    entry()
