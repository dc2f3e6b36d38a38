"""The paper's experiments at laboratory size: forgetting against N, λ, penalty, antithetic pairs and random rewards.

It runs (or resumes) every row for every pretraining seed and ES seed. Then it writes runs.csv (a line for each
evaluation) and the table and figures of finished runs.

Command:  python -m experiments.lab_study --models lab runs/lab-1 --seeds 0 1 2 --out=runs/lab_study --docs=docs/lab
Cost:     40 minutes on one of 2 shared CPU cores for 78 runs; the steps of a run take 20 s, with N = 32 85 s, with N =
          128 200 s.
Result:   docs/study.md
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from configs.lab import get_config
from es_jax.plotting import Series, read_run
from es_jax.plotting.figures import accuracy_over_iterations, drift_against_theory, strength_sweep
from es_jax.tasks.lab import PRIOR
from es_jax.training.loop import run
from experiments.runs import check_models, done, mean_se, plain_errors

ROWS = {
    "ES, N=8": "",
    "ES, N=8, AWD l2 0.01": "anchor=l2,strength=2",
    "ES, N=8, random rewards": "rewards=random",
    "ES, N=8, antithetic": "antithetic=true",
    "ES, N=8, AWD l1 1e-4": "anchor=l1,strength=0.02",
    "ES, N=8, AWD l2 0.001": "anchor=l2,strength=0.2",
    "ES, N=8, AWD l2 0.1": "anchor=l2,strength=20",
    "ES, N=32": "population=32",
    "ES, N=8, AWD l2 0.003": "anchor=l2,strength=0.6",
    "ES, N=8, AWD l2 0.03": "anchor=l2,strength=6",
    "ES, N=8, AWD l2 0.3": "anchor=l2,strength=60",
    "ES, N=8, AWD l1 3e-4": "anchor=l1,strength=0.06",
    "ES, N=128": "population=128",
}
TARGET, REFERENCE = "lab-countdown", "ES, N=8"
COLUMNS = ("row", "model", "seed", "step", TARGET, "prior", *PRIOR, "drift", "theory", "seconds")


def folder_of(out: Path, row: str, model: str, seed: int) -> Path:
    return out / Path(model).name / row.replace(", ", "_").replace(" ", "_").replace("=", "") / str(seed)


def evaluations(folder: Path, **labels: object) -> list[dict]:
    """A line for each evaluation of a run."""
    record = read_run(folder)
    metrics = {row["step"]: row for row in record.metrics}
    spent = np.cumsum([row["seconds"] for row in record.metrics])
    out = []
    for step, rows in record.rows([TARGET, *PRIOR]).items():
        target, *prior = [row["accuracy"] for row in rows]
        now = metrics.get(step, {"drift": 0.0, "drift_theory": 0.0})
        line = {"step": step, TARGET: target, "prior": round(np.mean(prior), 5), **dict(zip(PRIOR, prior, strict=True))}
        line |= {"drift": now["drift"], "theory": now["drift_theory"], "seconds": spent[step - 1] if step else 0.0}
        out.append(labels | line)
    return out


def table(lines: list[dict]) -> str:
    """Markdown: the last evaluation of every row, and the paired difference from ES at N = 8 with the same seeds."""
    last = {(x["row"], x["model"], x["seed"]): x for x in lines}
    text = ["| run | runs | target | prior | prior − prior of ES, N=8 (paired) | drift | drift / closed form |"]
    text.append("|---|---|---|---|---|---|---|")
    base = {x["model"]: x for x in lines if x["step"] == 0}.values()
    text.append(
        f"| base | {len(base)} | " + " | ".join(mean_se([x[c] for x in base]) for c in (TARGET, "prior")) + " | | 0 | |"
    )
    for row in ROWS:
        own = {key[1:]: x for key, x in last.items() if key[0] == row}
        if not own:
            continue
        pairs = [x["prior"] - last[REFERENCE, *key]["prior"] for key, x in own.items() if (REFERENCE, *key) in last]
        cells = [str(len(own)), *(mean_se([x[c] for x in own.values()]) for c in (TARGET, "prior"))]
        cells += [
            mean_se(pairs) if pairs and row != REFERENCE else "",
            f"{np.mean([x['drift'] for x in own.values()]):.2f}",
        ]
        closed = [x["drift"] / x["theory"] for x in own.values() if x["theory"] is not None]  # l1 has no closed form
        cells += [f"{np.mean(closed):.3f}" if closed else "–"]
        text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def figures(finished: dict[str, list[Path]], docs: Path) -> None:
    """Figures: every task over iterations for three rows, the sweep of λ, and drift against theory; means over models
    and seeds."""
    series = {row: Series(row, tuple(map(read_run, folders))) for row, folders in finished.items()}
    examples = [series[row] for row in (REFERENCE, "ES, N=8, AWD l2 0.01", "ES, N=8, random rewards") if row in series]
    plots = {
        "curves": accuracy_over_iterations(examples),
        "sweep": strength_sweep(list(series.values()), PRIOR),
        "drift": drift_against_theory(list(series.values())),
    }
    for name, plot in plots.items():
        if plot is not None:
            plot.figure.savefig(docs / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lab"], help="model.source for each pretraining seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/lab_study"))
    parser.add_argument("--docs", type=Path, default=Path("docs/lab"))
    parser.add_argument("--only-report", action="store_true", help="run nothing; report finished runs")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    with plain_errors(traceback=args.traceback):
        study(args)


def study(args: argparse.Namespace) -> None:
    """Run unfinished runs, and report finished ones."""
    work = [(row, model, seed) for row in args.rows for seed in args.seeds for model in args.models]
    lines, finished = [], {}
    if not args.only_report:
        check_models({model: "--seed=SEED" for model in args.models if model != "lab"})
    for row, model, seed in work:
        folder = folder_of(args.out, row, model, seed)
        if not args.only_report and not done(folder):
            config = get_config(f"{ROWS[row]},seed={seed}")
            config.model.source = model
            run(config, folder)
        if done(folder):
            lines += evaluations(folder, row=row, model=Path(model).name, seed=seed)
            finished.setdefault(row, []).append(folder)
    if not finished:
        print("no run is finished: leave --only-report out")
        return
    args.docs.mkdir(parents=True, exist_ok=True)
    with open(args.docs / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    (args.docs / "table.md").write_text(table(lines) + "\n")
    figures(finished, args.docs)
    print(table(lines))


if __name__ == "__main__":
    main()
