"""What the experiments share: a list of cases → runs, resumed where they stopped → rows of evaluations → a table.

A case is a run: labels that tell it from the others, and its config. Runs go one after another, or one of them with
--index=$I, as in a job array; whatever is finished is reported, and a started run goes on.
"""

import argparse
import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import config_dict

from es_jax.training.config import RunConfig, freeze
from es_jax.training.evalsfile import read_evals
from es_jax.training.loop import run
from es_jax.training.metrics import read_jsonl

SIZES = ("lab", "full")
EVALS = {"evals.size": 100, "train.samples": 1}  # of a run at laboratory size
MEASURED = ("accuracy", "prior", "prior_change", "of_format", "of_knowledge", "drift", "ratio", "kappa")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
      labels: what tells it from the others, "seed" among them; they name its folder and group the table.
      config: of the run.
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


def execute(cases: Sequence[Case], out: Path, *, index: int | None = None) -> None:
    """Run, or go on with, all cases or number `index`. A finished one is left as it is.

    Raises:
      ValueError: two cases have the same labels, or there is no such case.
    """
    if len({case.folder(out) for case in cases}) < len(cases):
        raise ValueError("two cases have the same labels: give each its own")
    if index is not None and not 0 <= index < len(cases):
        raise ValueError(f"index is {index}: there are {len(cases)} cases, 0 to {len(cases) - 1}")
    for case in cases if index is None else [cases[index]]:
        if not (case.folder(out) / "DONE").exists():
            run(case.config, case.folder(out))


def evaluations(case: Case, folder: Path) -> list[dict[str, Any]]:
    """A line for each evaluation of a run: its labels, step, accuracy on the target and mean over the prior tasks.

    of_format and of_knowledge are the parts of the prior tasks' drop; ratio is drift over the closed form.
    """
    config = case.config
    target = {row["step"]: row for row in read_evals(folder / "evals" / f"{config.task.name}.jsonl")}
    others = [read_evals(folder / "evals" / f"{name}.jsonl") for name in config.evals.tasks if name != config.task.name]
    metrics = {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl")}
    lines = []
    for i, (step, row) in enumerate(target.items()):
        prior = [rows[i] for rows in others]
        mean = lambda name, prior=prior: float(np.mean([p[name] for p in prior])) if prior else None  # noqa: E731
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
        })  # fmt: skip
    return lines


def mean_se(values: Iterable[float | None], digits: int = 3) -> str:
    """mean ± standard error, or the mean where there is one value; – where there is none."""
    given = [value for value in values if value is not None]
    if not given:
        return "–"
    se = f" ± {np.std(given, ddof=1) / math.sqrt(len(given)):.{digits}f}" if len(given) > 1 else ""
    return f"{np.mean(given):.{digits}f}{se}"


def table(lines: Sequence[Mapping[str, Any]], labels: Sequence[str], columns: Sequence[str] = MEASURED) -> str:
    """Markdown: the last evaluation of every case, mean ± standard error over what is not among `labels`."""
    last: dict[tuple, Mapping[str, Any]] = {}
    for line in lines:
        last[tuple(value for name, value in line.items() if name in labels or name == "seed")] = line
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in last.values():
        groups.setdefault(tuple(line[name] for name in labels), []).append(line)
    head = [*labels, "runs", "step", *columns]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, rows in groups.items():
        cells = [*map(str, key), str(len(rows)), str(rows[0]["step"])]
        text.append("| " + " | ".join(cells + [mean_se(row[name] for row in rows) for name in columns]) + " |")
    return "\n".join(text)


def main(
    doc: str | None,
    name: str,
    cases: Callable[..., Sequence[Case]],
    *,
    labels: Sequence[str],
    figure: Callable[[list[dict[str, Any]], Path], None] | None = None,
) -> None:
    """The command line of an experiment: run or resume, then write name.csv, name.md and name.png.

    Args:
      doc: the experiment's docstring.
      name: of its files and of its folder of runs.
      cases: (size, seeds) → the list.
      labels: what the table's rows are told apart by.
      figure: draws the lines into a file.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="lab")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--docs", type=Path, help="where the report goes; the out folder by default")
    parser.add_argument("--index", type=int, help="run only this case, as in a job array")
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    parser.add_argument("--only-report", action="store_true", help="run nothing; report what is finished")
    args = parser.parse_args()
    made = list(cases(args.size, args.seeds))
    if args.list:
        print("\n".join(f"{i} {case.folder(args.out)}" for i, case in enumerate(made)))
        return
    if not args.only_report:
        execute(made, args.out, index=args.index)
    lines = [
        line
        for case in made
        if (case.folder(args.out) / "DONE").exists()
        for line in evaluations(case, case.folder(args.out))
    ]
    report(lines, args.docs or args.out, name, labels=labels, figure=figure)


def report(
    lines: list[dict[str, Any]],
    docs: Path,
    name: str,
    *,
    labels: Sequence[str],
    columns: Sequence[str] = MEASURED,
    figure: Callable[[list[dict[str, Any]], Path], None] | None = None,
) -> None:
    """name.csv with a line for each evaluation, name.md with the table, name.png."""
    if not lines:
        print("no case is finished")
        return
    docs.mkdir(parents=True, exist_ok=True)
    with open(docs / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    text = table(lines, labels, columns)
    (docs / f"{name}.md").write_text(text + "\n")
    if figure is not None:
        figure(lines, docs / f"{name}.png")
    print(text)
