"""Common code of the experiments: a list of cases → runs, resumed where they stopped → rows of evaluations → a table.

A case is a run: labels that identify it, and its config. Runs go one after another, or only one with --index=$I, as in
a job array. Finished runs are reported, and a started run is resumed. If the runs can be compared, the page of `python
-m es_jax.report` is written too.
"""

import argparse
import contextlib
import csv
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ml_collections import config_dict

from es_jax.plotting import read_run
from es_jax.report import write_report
from es_jax.training.config import RunConfig, freeze
from es_jax.training.loop import run

Item = TypeVar("Item")
SIZES = ("lab", "full")
EVALS = {"evals.rows": 100, "train.samples": 1}  # settings of a run at laboratory size
PRETRAINED = {  # model.source → arguments of experiments.pretrain_lab that make it
    "runs/lab-1": "--seed=1",
    "runs/lab-sort": "--target=sort",
    "runs/lab-far": "--echo=0.9",
    "runs/lab-qwen3": "--family=qwen3",
    "runs/lab-gemma2": "--family=gemma2",
}
MEASURED = ("accuracy", "prior", "prior_change", "of_format", "of_knowledge", "drift", "ratio", "kappa")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
      labels: what identifies it, including "seed"; they name its folder and group the table.
      config: the run's config.
    """

    labels: Mapping[str, Any]
    config: RunConfig

    @classmethod
    def of(cls, config: config_dict.ConfigDict, **labels: Any) -> "Case":
        return cls(labels, freeze(config))

    def folder(self, out: Path) -> Path:
        """The run's directory."""
        return out / "_".join(
            f"{name}-{value}".replace("/", "-").replace(" ", "-") for name, value in self.labels.items()
        )


def chosen(items: Sequence[Item], index: int | None) -> Sequence[Item]:
    """All items, or only number `index`.

    Raises:
      ValueError: there is no such item.
    """
    if index is None:
        return items
    if not 0 <= index < len(items):
        raise ValueError(f"index is {index}: it must be 0 to {len(items) - 1}, the numbers that --list prints")
    return [items[index]]


def check_models(pretrained: Mapping[str, str]) -> None:
    """Raises FileNotFoundError, which names the command, if a folder of {folder: arguments that make it} is missing."""
    missing = {folder: arguments for folder, arguments in pretrained.items() if not Path(folder).exists()}
    if missing:
        commands = [
            f"python -m experiments.pretrain_lab {arguments} --out={folder}" for folder, arguments in missing.items()
        ]
        raise FileNotFoundError(f"the model {', '.join(missing)} does not exist: run {' and '.join(commands)}")


def execute(cases: Sequence[Case], out: Path, *, index: int | None = None) -> None:
    """Run or resume all cases, or only number `index`. Finished ones are left as they are.

    Raises:
      ValueError: two cases have the same labels, or there is no such case.
      FileNotFoundError: a pretrained model is missing.
    """
    if len({case.folder(out) for case in cases}) < len(cases):
        raise ValueError("two cases have the same labels: give each case its own")
    left = [case for case in chosen(cases, index) if not done(case.folder(out))]
    sources = dict.fromkeys(case.config.model.source for case in left)
    check_models({source: PRETRAINED[source] for source in sources if source in PRETRAINED})
    for case in left:
        run(case.config, case.folder(out))


def done(folder: Path) -> bool:
    """Whether the run in the folder is finished."""
    return (folder / "DONE").exists()


def evaluations(case: Case, folder: Path) -> list[dict[str, Any]]:
    """A line for each step at which all of a run's tasks were evaluated.

    It has the labels, the step, the accuracy on the target and the mean over the prior tasks. of_format and
    of_knowledge are parts of the prior tasks' drop; ratio is drift over the closed form; pace is the run's median of
    seconds per step.
    """
    config, record = case.config, read_run(folder)
    metrics = {row["step"]: row for row in record.metrics}
    others = [name for name in config.evals.tasks if name != config.task.name]
    lines, paces = [], [row["seconds"] for row in record.metrics if "seconds" in row]
    for step, (row, *prior) in record.rows([config.task.name, *others]).items():
        mean = lambda name, prior=prior: (  # noqa: E731
            float(np.mean([p[name] for p in prior])) if prior and all(name in p for p in prior) else None
        )
        now = metrics.get(step, {})
        theory = now.get("drift_theory")
        lines.append({
            **case.labels,
            "step": step,
            "accuracy": row["accuracy"],
            "prior": mean("accuracy"),
            "prior_change": mean("accuracy_change"),
            "of_format": mean("lost_format"),
            "of_knowledge": mean("lost_knowledge"),
            "drift": now.get("drift", 0.0),
            "ratio": now["drift"] / theory if theory else None,
            "kappa": now.get("kappa", 0.0),
            "pace": float(np.median(paces)) if paces else None,
        })  # fmt: skip
    return lines


def mean_se(values: Iterable[float | None], digits: int = 3) -> str:
    """ "mean ± standard error", or only the mean for one value, or "–" for none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    se = f" ± {np.std(numbers, ddof=1) / math.sqrt(len(numbers)):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{se}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["N", "drift"], [["8", "9.21"]]))
    | N | drift |
    |---|---|
    | 8 | 9.21 |
    """
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines, which have the same columns, as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def table(lines: Sequence[Mapping[str, Any]], labels: Sequence[str], columns: Sequence[str] = MEASURED) -> str:
    """Markdown: the last evaluation of every case, as mean ± standard error over everything that is not in `labels`."""
    last: dict[tuple, Mapping[str, Any]] = {}
    for line in lines:
        last[tuple(value for name, value in line.items() if name in labels or name == "seed")] = line
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in last.values():
        groups.setdefault(tuple(line[name] for name in labels), []).append(line)
    body = [
        [*map(str, key), str(len(rows)), str(rows[0]["step"]), *(mean_se(row[x] for row in rows) for x in columns)]
        for key, rows in groups.items()
    ]
    return markdown([*labels, "runs", "step", *columns], body)


def main(
    doc: str | None,
    name: str,
    cases: Callable[..., Sequence[Case]],
    *,
    labels: Sequence[str],
    figure: Callable[[list[dict[str, Any]], Path], None] | None = None,
    table: Callable[[list[dict[str, Any]]], str] | None = None,
) -> None:
    """The command line of an experiment: runs or resumes, then writes name.csv, name.md and name.png.

    Args:
      doc: the experiment's docstring.
      name: the name of its files and of its folder of runs.
      cases: (size, seeds) → the list of cases.
      labels: what distinguishes the table's rows.
      figure: draws the lines to a file.
      table: makes the table from the lines, instead of the common one.
    """
    args = arguments(doc, name).parse_args()
    with plain_errors(traceback=args.traceback):
        grid = list(cases(args.size, args.seeds))
        if args.list:
            print("\n".join(f"{i} {case.folder(args.out)}" for i, case in enumerate(grid)))
            return
        if not args.only_report:
            execute(grid, args.out, index=args.index)
        finished = {case.folder(args.out): case for case in grid if done(case.folder(args.out))}
        lines = [line for folder, case in finished.items() for line in evaluations(case, folder)]
        report(lines, args.docs or args.out, name, labels=labels, figure=figure, text=table and table(lines))
        page(list(finished), args.out / "report")


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The parser of an experiment with that docstring and that name of the folder of runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="lab")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--docs", type=Path, help="folder for the report; --out by default")
    parser.add_argument("--index", type=int, help="run only this case, as in a job array")
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    parser.add_argument("--only-report", action="store_true", help="run nothing; report finished runs")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


@contextlib.contextmanager
def plain_errors(*, traceback: bool) -> Iterator[None]:
    """An error in the input ends the program with its message, and with a traceback only if asked for."""
    try:
        yield
    except (ValueError, OSError) as error:
        if traceback:
            raise
        sys.exit(str(error))


def page(folders: Sequence[Path], out: Path) -> None:
    """Write the page of `python -m es_jax.report` about these runs, or say why there is none; the experiment does not
    need it."""
    if folders:
        try:
            print(write_report(folders, out)["page"])
        except (ValueError, OSError) as error:
            print(f"no page of es_jax.report: {error}")


def report(
    lines: list[dict[str, Any]],
    docs: Path,
    name: str,
    *,
    labels: Sequence[str],
    columns: Sequence[str] = MEASURED,
    figure: Callable[[list[dict[str, Any]], Path], None] | None = None,
    text: str | None = None,
) -> None:
    """Write name.csv with a line for each evaluation, name.md with the table, and name.png."""
    if not lines:
        print("no case is finished: leave --only-report out")
        return
    write_csv(docs / f"{name}.csv", lines)
    text = text or table(lines, labels, columns)
    (docs / f"{name}.md").write_text(text + "\n")
    if figure is not None:
        figure(lines, docs / f"{name}.png")
    print(text)
