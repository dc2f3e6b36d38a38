"""Question: does the first command of the README learn on two cores in 15 minutes, and does its control not learn?

It runs the command for each seed, and again with random rewards: the same random walk, which should teach nothing. The
number of steps is that of the config and was fixed before the first of these runs; each run compiles its programs.
Seconds are CPU time (user and system, all cores), so a shared or interrupted machine measures the same.

Command:  python -m experiments.first_run [--seeds 0 1 2] [--docs=docs/first_run] [--list] [--only-report]
          first `make smollm2`; after an interruption the same command continues
Cost:     see configs/json_facts.py; two runs a seed
Result:   docs/first-run.md; docs/first_run/first_run.csv
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_jax.rundir.metrics import read_jsonl
from experiments.runs import done, mean_se, report

TASK = "json-facts"
COLUMNS = ("reward", "reward_se", "reward_change", "reward_change_se", "accuracy", "accuracy_se", "accuracy_change",
           "accuracy_change_se", "mean_length", "truncated")  # fmt: skip


def commands(seeds: Sequence[int], out: Path) -> Iterator[tuple[dict[str, Any], str, Path]]:
    """(labels, command, run's directory) of every run: first the task's rewards for all seeds, then the controls."""
    for rewards in ("task", "random"):
        for seed in seeds:
            argument = ",".join([f"seed={seed}", *(["rewards=random"] if rewards == "random" else [])])
            folder = out / f"{rewards}-{seed}"
            command = f"python -m es_jax.train --config=configs/json_facts.py:{argument} --workdir={folder}"
            yield {"rewards": rewards, "seed": seed}, command, folder


def execute(command: str, folder: Path) -> None:
    """Run or resume a command, and add its cost to FOLDER.cost.json."""
    path, before, began = folder.with_suffix(".cost.json"), resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    status = subprocess.run([sys.executable, *command.split()[1:]], check=False).returncode
    after, cost = resource.getrusage(resource.RUSAGE_CHILDREN), json.loads(path.read_text()) if path.exists() else {}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    spent = {"cpu_seconds": cpu, "wall_seconds": time.time() - began, "starts": 1}
    path.write_text(json.dumps({name: round(value + cost.get(name, 0)) for name, value in spent.items()}) + "\n")
    if status:
        sys.exit(f"{command} ended with status {status}: start the same command again; finished steps are kept")


def lines(seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """A line for each evaluation of each finished run."""
    found = []
    for labels, command, folder in commands(seeds, out):
        if done(folder):
            cost = json.loads(folder.with_suffix(".cost.json").read_text())
            drift = {row["step"]: row["drift"] for row in read_jsonl(folder / "metrics.jsonl") if "drift" in row}
            found += [
                {**labels, "step": row["step"], "rows": row["n"], **{name: row[name] for name in COLUMNS},
                 "drift": drift.get(row["step"], 0.0), **cost, "command": command}
                for row in read_jsonl(folder / f"evals/{TASK}.jsonl")
            ]  # fmt: skip
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each run, before and after, and the means over seeds with their standard errors."""
    head = "| rewards | seed | steps | reward before | reward after | change, paired | right before | right after |"
    text = [f"{head} drift | minutes on 2 cores |", "|" + "---|" * 10]
    for rewards in dict.fromkeys(row["rewards"] for row in rows):
        own = [row for row in rows if row["rewards"] == rewards]
        last = [[row for row in own if row["seed"] == seed][-1] for seed in dict.fromkeys(row["seed"] for row in own)]
        first = {row["seed"]: row for row in own if row["step"] == 0}
        for row in last:
            base = first[row["seed"]]
            text.append(
                f"| {rewards} | {row['seed']} | {row['step']} | {base['reward']:.3f} ± {base['reward_se']:.3f} "
                f"| {row['reward']:.3f} ± {row['reward_se']:.3f} "
                f"| {row['reward_change']:+.3f} ± {row['reward_change_se']:.3f} | {base['accuracy']:.2f} "
                f"| {row['accuracy']:.2f} | {row['drift']:.2f} | {row['cpu_seconds'] / 120:.1f} |"
            )
        if len(last) > 1:
            mean = {name: mean_se(row[name] for row in last) for name in ("reward", "reward_change")}
            right = mean_se((row["accuracy"] for row in last), 2)
            text.append(f"| {rewards} | mean | | | {mean['reward']} | {mean['reward_change']} | | {right} | | |")
    return "\n".join(text)


def write(rows: list[dict[str, Any]], docs: Path) -> None:
    """Write first_run.csv and first_run.md, and the table in the page next to the folder if there is one."""
    report(rows, docs, "first_run", labels=(), text=table(rows))
    if rows and (page := docs.parent / "first-run.md").exists():
        before, start, rest = page.read_text().partition("<!-- table -->\n")
        page.write_text(f"{before}{start}{table(rows)}\n{rest[rest.index('<!-- end of table -->') :]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/first_run"))
    parser.add_argument("--docs", type=Path, help="folder for the report; --out by default")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--only-report", action="store_true", help="run nothing; report finished runs")
    args = parser.parse_args()
    for _, command, folder in commands(args.seeds, args.out):
        if args.list:
            print(command)
        elif not args.only_report and not done(folder):
            execute(command, folder)
            write(lines(args.seeds, args.out), args.docs or args.out)
    if args.only_report:
        write(lines(args.seeds, args.out), args.docs or args.out)


if __name__ == "__main__":
    main()
