"""Question: how much is forgotten against target, population size and AWD (arXiv 2605.30148, its main grid)?

Targets × N in {30, 128, 256} × AWD off and on, independent seeds: of the noise, of the order of prompts and, at
laboratory size, of the target's training rows.

Command:  python -m experiments.forgetting [--size=full] [--index=$I] [--docs=docs/lab]
Cost:     laboratory: not yet run. Full: 3 targets × 3 N × 2 × seeds of 500 steps, not yet run.
Result:   not yet run, at either size.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from configs import countdown, gsm8k, lab, proofwriter
from experiments.runs import EVALS, Case, main

POPULATIONS = (30, 128, 256)
ANCHORS = {"none": "", "l2": "anchor=l2"}
TARGETS = {"countdown": countdown, "gsm8k": gsm8k, "proofwriter": proofwriter}
PRIOR = ("hellaswag", "piqa", "arc-challenge", "mmlu-pro")
SMALL = {"task.prompts_per_step": 16, "train.steps": 30, "train.checkpoint_every": 30, "evals.every": 15} | EVALS


def cases(size: str, seeds: Sequence[int]) -> Iterator[Case]:
    """Every run of the grid."""
    for seed in seeds:
        for target in ("lab-countdown",) if size == "lab" else TARGETS:
            for population in POPULATIONS:
                for anchor, argument in ANCHORS.items():
                    text = f"pop={population},seed={seed},{argument}".rstrip(",")
                    config = lab.get_config(text) if size == "lab" else TARGETS[target].get_config(text)
                    if size == "lab":
                        config.update_from_flattened_dict(SMALL)
                        config.task.seed = seed
                    else:
                        config.evals.tasks = PRIOR
                    yield Case.of(config, target=target, N=population, AWD=anchor, seed=seed)


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """Mean prior accuracy against the drift of a weight, every evaluation of every run."""
    drawing = Figure(figsize=(5.6, 3.6), layout="constrained", dpi=150)
    axes = drawing.subplots()
    for marker, population in zip("os^", POPULATIONS, strict=True):
        for anchor, face in (("none", "none"), ("l2", "0.3")):
            mine = [x for x in lines if (x["N"], x["AWD"]) == (population, anchor) and x["step"]]
            x, y = [line["kappa"] for line in mine], [line["prior"] for line in mine]
            label = f"N = {population}" + (", AWD" if anchor == "l2" else "")
            axes.scatter(x, y, marker=marker, facecolors=face, edgecolors="0.2", label=label)
    axes.set(xlabel="κ, the drift of a weight in σ", ylabel="mean accuracy on 7 prior tasks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.savefig(path)


if __name__ == "__main__":
    main(__doc__, "forgetting", cases, labels=("target", "N", "AWD"), figure=figure)
