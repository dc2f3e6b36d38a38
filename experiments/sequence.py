"""Question: in a sequence of tasks, should AWD pull to the first base model or to where each task began?

Three tasks one after another, each from the weights of the one before: without AWD, with the anchor at the first base
model, and re-anchored at the start of each task. At laboratory size the model does not know the first task (it echoes)
and knows the others, so the question is what becomes of the skill that was learnt first.

Command:  python -m experiments.sequence [--size=full] [--seeds 0 1] [--docs=docs/lab]
Cost:     laboratory: under a minute a seed on 2 idle CPU cores. Full: 9 runs of 500 steps a seed, not yet
          run; by the plan of Qwen2.5-3B on eight H100 (docs/scale.md, a bound) at least 27 hours a seed.
Result:   laboratory, seeds 0 and 1: re-anchored keeps .41 of the first task and .69 of what was never trained; to the
          first base keeps .21 and .90; no anchor .31 and .49. Full: not yet run.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import countdown, gsm8k, lab, proofwriter
from es_jax.tasks.lab import PRIOR as LAB_PRIOR
from es_jax.training.evalsfile import read_evals
from es_jax.training.export import export_run
from experiments.forgetting import PRIOR
from experiments.runs import EVALS, SIZES, Case, execute, report

ANCHORS = ("none", "base", "re-anchored")
LABELS = {"none": "no AWD", "base": "AWD to the first base", "re-anchored": "AWD re-anchored"}
STAGES = {"lab": ("lab-countdown", "lab-add", "lab-sort"), "full": ("countdown", "gsm8k", "proofwriter")}
FULL = {"countdown": countdown, "gsm8k": gsm8k, "proofwriter": proofwriter}
SMALL = {"task.prompts_per_step": 32, "train.steps": 80, "train.checkpoint_every": 80, "evals.every": 40} | EVALS


def case(size: str, stage: int, anchor: str, seed: int, *, start: str) -> Case:
    """A stage of a sequence, from the model `start`."""
    task = STAGES[size][stage]
    argument = f"seed={seed + 1000 * stage}" + ("" if anchor == "none" else ",anchor=l2")
    config = lab.get_config(f"{argument},target={task}") if size == "lab" else FULL[task].get_config(argument)
    others = {name: 0 for name in (*STAGES[size], *(LAB_PRIOR if size == "lab" else PRIOR)) if name != task}
    config.evals.tasks = tuple(others)
    if anchor == "base" and stage:
        config.optim.anchor.source = config.model.source
    config.model.source = start or config.model.source
    if size == "lab":
        config.update_from_flattened_dict(SMALL)
    return Case.of(config, anchor=anchor, stage=stage, task=task, seed=seed)


def sequence(size: str, anchor: str, seed: int, out: Path) -> Iterator[tuple[Case, Path]]:
    """Run, or go on with, one sequence; every stage and its directory as it is done."""
    start = ""
    for stage in range(len(STAGES[size])):
        now = case(size, stage, anchor, seed, start=start)
        execute([now], out)
        yield now, now.folder(out)
        folder = out / "weights" / now.folder(out).name
        if not folder.exists():
            export_run(now.folder(out), folder)
        start = str(folder)


def lines_of(size: str, now: Case, folder: Path, *, steps: int) -> list[dict[str, Any]]:
    """A line for each evaluation of a stage: every stage's task, and the mean over the tasks never trained."""
    stages = STAGES[size]
    names = (now.config.task.name, *now.config.evals.tasks)
    rows = {name: read_evals(folder / "evals" / f"{name}.jsonl") for name in names}
    rest = [name for name in rows if name not in stages]
    return [
        {
            **now.labels,
            "step": now.labels["stage"] * steps + rows[now.config.task.name][i]["step"],
            **{f"stage {s}: {name}": rows[name][i]["accuracy"] for s, name in enumerate(stages)},
            "never trained": float(np.mean([rows[name][i]["accuracy"] for name in rest])),
        }
        for i in range(len(rows[now.config.task.name]))
    ]


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """The first stage's task and those never trained, over all stages."""
    drawing = Figure(figsize=(8.0, 3.4), layout="constrained", dpi=150)
    first = next(name for name in lines[0] if name.startswith("stage 0:"))
    for axes, column in zip(drawing.subplots(1, 2, sharey=True), (first, "never trained"), strict=True):
        for anchor, style in zip(ANCHORS, ("-o", "--s", ":^"), strict=True):
            mine = [x for x in lines if x["anchor"] == anchor]
            steps = sorted({x["step"] for x in mine})
            means = [np.mean([x[column] for x in mine if x["step"] == step]) for step in steps]
            axes.plot(steps, means, style, label=LABELS[anchor])
        title = column if column == "never trained" else f"{column.partition(': ')[2]}, trained first"
        axes.set(title=title, xlabel="iteration", ylim=(0, 1.03))
        axes.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("held-out accuracy")
    drawing.axes[1].legend(fontsize=8)
    drawing.savefig(path)


def run_all(size: str, seeds: Sequence[int], anchors: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Every sequence's lines."""
    lines = []
    for seed in seeds:
        for anchor in anchors:
            for now, folder in sequence(size, anchor, seed, out):
                lines += lines_of(size, now, folder, steps=now.config.train.steps)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="lab")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/sequence"))
    parser.add_argument("--docs", type=Path, help="where the report goes; the out folder by default")
    parser.add_argument("--index", type=int, help="run only this sequence of seeds × anchors, as in a job array")
    args = parser.parse_args()
    pairs = [(seed, anchor) for seed in args.seeds for anchor in ANCHORS]
    if args.index is not None:
        seed, anchor = pairs[args.index]
        run_all(args.size, [seed], [anchor], args.out)
        return
    lines = run_all(args.size, args.seeds, ANCHORS, args.out)
    columns = [name for name in lines[0] if name.startswith("stage ")] + ["never trained"]
    report(lines, args.docs or args.out, "sequence", labels=("stage", "task", "anchor"), columns=columns, figure=figure)


if __name__ == "__main__":
    main()
