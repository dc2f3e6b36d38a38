"""Question: in a sequence of tasks, should AWD pull toward the first base model or toward the start of each task?

It trains three tasks in sequence, each from the weights of the one before: without AWD, with the anchor at the first
base model, and re-anchored at the start of each task. At laboratory size the model does not know the first task (it
echoes) but knows the others, so the question is whether the skill that it learnt first is retained.

Command:  python -m experiments.sequence [--size=full] [--index=$I] [--seeds 0 1] [--docs=docs/lab]
          --index counts whole sequences, since a stage needs the one before.
Cost:     laboratory: under a minute a seed on 2 idle CPU cores. Full: 9 runs of 500 steps a seed, not yet
          run; by the plan of Qwen2.5-3B on eight H100 (docs/scale.md, a bound) at least 27 hours a seed.
Result:   laboratory, seeds 0 and 1: re-anchoring keeps .41 of the first task and .69 of the tasks never trained; the
          anchor at the first base model keeps .21 and .90; no anchor keeps .31 and .49. Full: not yet run.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import countdown, gsm8k, lab, proofwriter
from es_jax.evals.export_step import export_run
from es_jax.plotting import read_run
from es_jax.tasks.lab import PRIOR as LAB_PRIOR
from experiments.forgetting import PRIOR
from experiments.runs import EVALS, Case, arguments, chosen, done, execute, plain_errors, report

ANCHORS = ("none", "base", "re-anchored")
LABELS = {"none": "no AWD", "base": "AWD to the first base", "re-anchored": "AWD re-anchored"}
STAGES = {"lab": ("lab-countdown", "lab-add", "lab-sort"), "full": ("countdown", "gsm8k", "proofwriter")}
FULL = {"countdown": countdown, "gsm8k": gsm8k, "proofwriter": proofwriter}
SMALL = {"task.prompts_per_step": 32, "train.steps": 80, "train.checkpoint_every": 80, "evals.every": 40} | EVALS


def case(size: str, stage: int, anchor: str, seed: int, *, start: str) -> Case:
    """The config of a stage of a sequence, from the model `start`."""
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


def sequence(size: str, anchor: str, seed: int, out: Path) -> list[Case]:
    """The stages of a sequence, each from the weights of the one before."""
    stages: list[Case] = []
    for stage in range(len(STAGES[size])):
        stages.append(case(size, stage, anchor, seed, start=str(weights(stages[-1], out)) if stages else ""))
    return stages


def weights(now: Case, out: Path) -> Path:
    """The folder for the final model of a stage."""
    return out / "weights" / now.folder(out).name


def run_sequence(stages: list[Case], out: Path) -> None:
    """Run or resume a sequence."""
    for now in stages:
        execute([now], out)
        if not weights(now, out).exists():
            export_run(now.folder(out), weights(now, out))


def lines_of(size: str, now: Case, folder: Path) -> list[dict[str, Any]]:
    """A line for each evaluation of a stage: accuracy on every stage's task, and the mean over the tasks never
    trained."""
    stages, names = STAGES[size], (now.config.task.name, *now.config.evals.tasks)
    lines = []
    for step, rows in read_run(folder).rows(names).items():
        accuracy = {name: row["accuracy"] for name, row in zip(names, rows, strict=True)}
        lines.append({
            **now.labels,
            "step": now.labels["stage"] * now.config.train.steps + step,
            **{column: accuracy[name] for column, name in zip(columns(size), stages, strict=True)},
            "never trained": float(np.mean([value for name, value in accuracy.items() if name not in stages])),
        })  # fmt: skip
    return lines


def columns(size: str) -> list[str]:
    """Columns of the table: the accuracy on each stage's task."""
    return [f"stage {s}: {name}" for s, name in enumerate(STAGES[size])]


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on the first stage's task and on those never trained, over all stages."""
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


def main() -> None:
    args = arguments(__doc__, "sequence").parse_args()
    with plain_errors(traceback=args.traceback):
        pairs = itertools.product(args.seeds, ANCHORS)
        sequences = [sequence(args.size, anchor, seed, args.out) for seed, anchor in pairs]
        if args.list:
            print("\n".join(f"{i} {' '.join(str(s.folder(args.out)) for s in x)}" for i, x in enumerate(sequences)))
            return
        for stages in () if args.only_report else chosen(sequences, args.index):
            run_sequence(stages, args.out)
        finished = [now for stages in sequences for now in stages if done(now.folder(args.out))]
        lines = [line for now in finished for line in lines_of(args.size, now, now.folder(args.out))]
        accuracies = [*columns(args.size), "never trained"]
        labels = ("stage", "task", "anchor")
        report(lines, args.docs or args.out, "sequence", labels=labels, columns=accuracies, figure=figure)


if __name__ == "__main__":
    main()
