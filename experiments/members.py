"""Question: does a run forget less at the same cost if it spends rollouts on members rather than prompts, and what does
AWD then add? Does low-rank noise change any of this?

Each step has 512 rollouts: 8 members × 64 prompts (as published, where all members see all prompts), 32 × 16, 128 × 4
and 512 × 1 on the same 64 prompts, and 512 members on one prompt as a control. The noise has full rank, rank 1 and rank
4; runs are without AWD and with l2 at κ = 1; there are three ES seeds and two pretrained models. In the 120 iterations
N = 8 walks as far as N = 30 does in the published 500: κ = 1.94.

Command:  python -m experiments.members --seeds 0 1 2 [--index=$I] [--docs=docs/lab]
          first python -m experiments.pretrain_lab --seed=1 --out=runs/lab-1
Cost:     a run of the laboratory takes 10 to 90 s on 2 CPU cores, 60 runs a seed.
Result:   docs/study.md, "Members or prompts"; docs/lab/members.csv
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import countdown, lab
from experiments.runs import Case, main, mean_se

ROLLOUTS, PROMPTS = 512, 64
DEALS = ((8, 64), (32, 64), (128, 64), (512, 64), (512, 1))  # (N, prompts a step); each member sees 512/N of them
NOISES = {"full rank": "noise=gaussian", "rank 1": "noise=low_rank,rank=1", "rank 4": "noise=low_rank,rank=4"}
ANCHORS = {"none": "", "l2": "anchor=l2,kappa=1"}
SMALL = {"train.steps": 120, "train.checkpoint_every": 120, "evals.every": 60, "train.samples": 1}
LABELS = ("N", "prompts", "noise", "AWD")
COLORS = {"full rank": "tab:blue", "rank 1": "tab:orange", "rank 4": "tab:green"}


def cases(size: str, seeds: Sequence[int]) -> Iterator[Case]:
    """Every run; all runs of a seed and a model come before the next ones."""
    models = ("lab", "runs/lab-1") if size == "lab" else ("qwen2.5-3b",)
    for seed, model, (awd, anchor), (n, prompts), (noise, text) in itertools.product(
        seeds, models, ANCHORS.items(), DEALS, NOISES.items()
    ):
        argument = ",".join(filter(None, [text, anchor, f"seed={seed},population={n}"]))
        config = lab.get_config(argument) if size == "lab" else countdown.get_config(f"{model},{argument}")
        config.task.prompts_per_step = prompts
        config.es.prompts_per_member = ROLLOUTS // n
        if size == "lab":
            config.model.source = model
            config.update_from_flattened_dict(SMALL)
            if noise == "full rank":
                config.decode.members_at_once = min(n, 64)
        name = Path(model).name
        yield Case.of(config, N=n, prompts=prompts, noise=noise, AWD=awd, model=name, seed=seed)


def last_lines(lines: Sequence[Mapping[str, Any]]) -> dict[tuple, Mapping[str, Any]]:
    """The last evaluation of every run, by (labels, model and seed)."""
    return {(tuple(x[name] for name in LABELS), (x["model"], x["seed"])): x for x in lines}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: means ± standard errors over runs, and differences paired by model and seed: from 8 full-rank members
    without AWD, and from the same members without AWD."""
    last = last_lines(lines)
    head = [
        "N × k",
        "prompts",
        "noise",
        "AWD",
        "runs",
        "target",
        "prior",
        "prior − that of 8 × 64",
        "AWD's part of prior",
    ]
    head += ["AWD's part of target", "drift", "drift / closed form", "seconds a step"]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in dict.fromkeys(labels for labels, _ in last):
        own = {pair: line for (labels, pair), line in last.items() if labels == key}
        n, prompts, noise, awd = key

        def paired(other: tuple, column: str, own: dict = own) -> str:
            return mean_se(x[column] - last[other, p][column] for p, x in own.items() if (other, p) in last)

        free = (n, prompts, noise, "none")
        cells = [f"{n} × {ROLLOUTS // n}", str(prompts), noise, awd, str(len(own))]
        cells += [mean_se(line[column] for line in own.values()) for column in ("accuracy", "prior")]
        cells += [paired((8, 64, "full rank", "none"), "prior")]
        cells += [paired(free, column) if awd != "none" else "" for column in ("prior", "accuracy")]
        cells += [f"{np.mean([line['drift'] for line in own.values()]):.3f}"]
        cells += [
            mean_se(line["ratio"] for line in own.values()),
            f"{np.median([x['pace'] for x in own.values()]):.3f}",
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """Target, mean of the prior tasks and drift against N, at 512 rollouts per step; crosses are runs on one prompt."""
    drawing, last = Figure(figsize=(11, 3.6), layout="constrained", dpi=150), last_lines(lines)
    panels = {"accuracy": "target", "prior": "mean prior", "kappa": "κ, drift in σ a weight"}
    for axes, (column, title) in zip(drawing.subplots(1, 3), panels.items(), strict=True):
        for noise, awd in itertools.product(NOISES, ANCHORS):
            points = {}
            for n, prompts in DEALS:
                values = [x[column] for (labels, _), x in last.items() if labels == (n, prompts, noise, awd)]
                if values:
                    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
                    points[n, prompts] = np.mean(values), error
            look: dict[str, Any] = {"color": COLORS[noise], "ls": "-" if awd == "none" else "--", "lw": 1.2}
            line = [(n, *point) for (n, prompts), point in points.items() if prompts == PROMPTS]
            if line:
                ns, means, errors = zip(*line, strict=True)
                label = noise if awd == "none" else f"{noise}, AWD at κ = 1"
                axes.errorbar(ns, means, errors, marker="o", ms=3, capsize=2, label=label, **look)
            if (512, 1) in points:
                fill = COLORS[noise] if awd == "none" else "white"
                axes.plot(560, points[512, 1][0], "X", color=COLORS[noise], mfc=fill, ms=7)
        axes.set(xscale="log", xlabel="members N, with 512/N prompts each", title=title)
        axes.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    drawing.savefig(path)


if __name__ == "__main__":
    main(__doc__, "members", cases, labels=LABELS, figure=figure, table=table)
