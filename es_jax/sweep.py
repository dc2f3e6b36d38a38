"""python -m es_jax.sweep --config=FILE[:args] --over "FIELD=VALUE,VALUE,…" ["FIELD=VALUE,…" …] --out=DIR [--list]

A run for every point of a grid: for every combination of the values of some fields, in DIR/<fields and values>. They
are run one after another in this process, which keeps what it compiled; or as a job array, with --index=K for one of
them, K from 0. All points are checked before the first begins. The same command goes on after an interruption: points
that are done are skipped. One that fails is told at the end, with exit status 1, and the others go on.

  --index=$SLURM_ARRAY_TASK_ID        of an array in SLURM (sbatch --array=0-5)
  --index=$JOB_COMPLETION_INDEX       of an indexed job in Kubernetes

At the end there are DIR/sweep.csv and sweep.json, with a row a point, and DIR/report of all runs. After an array, the
same command without --index makes them. See docs/sweep.md. With --json one line is printed:

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
            raise ValueError(f"--index is {values.index}, but the {len(points)} points have 0 to {last}: see --list")
        if values.list:
            rows = [{"index": i, "point": point.name, "state": state(point)} for i, point in enumerate(points)]
            print(json.dumps(rows) if values.json else _table(rows))
            return
        chosen = points if values.index is None else [points[values.index]]
        try:
            failed = run_points(chosen, values.out, details=values.traceback)
        except KeyboardInterrupt:
            sys.exit("es_jax.sweep: interrupted; the same command goes on from the last finished step")
        except processes.Preempted as stop:
            processes.leave(f"es_jax.sweep: {stop}")
        if values.index is None:
            result = summary(points, values.out, failed)
            print(json.dumps(result) if values.json else _words(result, values.out))
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        sys.exit(f"es_jax.sweep: {len(failed)} of {len(chosen)} points failed: {reasons}")


def run_points(points: Sequence[Any], out: str | Path, *, details: bool = False) -> dict[str, str]:
    """Runs the points that are not done, one after another, with one cache of compiled programs in out/cache.

    Args:
      points: what `es_jax.training.grid.make_points` returns, or some of it.
      out: the folder that it was given.
      details: show where errors came from.

    Returns:
      name of a point that failed → why.

    Raises:
      ValueError: the folder of a point has a run of another config. Nothing is begun then.
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
            except Exception as error:  # the other points go on, whatever it is
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

    `failed`: what `run_points` returned.
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
    report = result["report"] or f"there is no report: {result['absent']}"
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
    flags.DEFINE_string("out", None, "The folder for the runs, their table and report; a sweep that is there goes on.")
    flags.DEFINE_integer("index", None, "Run this point alone, from 0, as a job of an array.", lower_bound=0)
    flags.DEFINE_bool("list", False, "Print the points and how far each has come; run nothing.")
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")
    app.run(main, flags_parser=parser("es_jax.sweep", required=("config", "out"), fields=FIELDS))


if __name__ == "__main__":
    entry()
