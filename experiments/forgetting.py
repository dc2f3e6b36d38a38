"""Question: how does forgetting depend on the target, the population size and AWD (arXiv 2605.30148, its main grid)?

The grid is targets × N × AWD off and on, with independent seeds for the noise, the order of prompts and, at laboratory
size, the target's training rows. N is 30, 128 and 256 as published. At laboratory size N is 8, 32 and 128, and in 120
steps a weight drifts by 1.9, 0.97 and 0.48 σ (in the published 500 steps by 2.0, 0.99 and 0.70).

Command:  python -m experiments.forgetting [--size=full] [--index=$I] [--docs=docs/lab]
          laboratory: first python -m experiments.pretrain_lab --target=sort --out=runs/lab-sort
Cost:     laboratory: 12 runs a seed, 4 minutes of one CPU core.
          Full: 3 targets × 3 N × 2 × seeds of 500 steps, not yet run. By the plan of Qwen2.5-3B on eight H100
          (docs/scale.md: a bound, every completion at its full 1024 tokens) a step takes at least 22, 88 and 177 s at
          N = 30, 128 and 256, so a seed of them at least 239 hours.
Result:   laboratory, seeds 0 to 2: forgetting follows the drift, whether N or AWD limits it. Of .99 (lab-countdown) and
          .97 (lab-sort) prior accuracy .58 are left at κ = 1.9, .82 to .91 at 1 to 1.2, .94 to .97 at 0.5
          (docs/study.md). Full: not yet run.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from configs import countdown, gsm8k, lab, proofwriter
from es_jax.tasks.lab import PRIOR as LAB_PRIOR
from experiments.runs import EVALS, Case, main

POPULATIONS = {"lab": (8, 32, 128), "full": (30, 128, 256)}
ANCHORS = {"none": "", "l2": "anchor=l2"}
TARGETS = {"countdown": countdown, "gsm8k": gsm8k, "proofwriter": proofwriter}
LAB_TARGETS = {"lab-countdown": "lab", "lab-sort": "runs/lab-sort"}  # target → a model that answers it by an echo
PRIOR = ("hellaswag", "piqa", "arc-challenge", "mmlu-pro")
SMALL = {"task.prompts_per_step": 32, "train.steps": 120, "train.checkpoint_every": 120, "evals.every": 40} | EVALS


def cases(size: str, seeds: Sequence[int]) -> Iterator[Case]:
    """Every run of the grid."""
    for seed in seeds:
        for target in LAB_TARGETS if size == "lab" else TARGETS:
            for population in POPULATIONS[size]:
                for anchor, argument in ANCHORS.items():
                    text = f"population={population},seed={seed},{argument}".rstrip(",")
                    if size == "lab":
                        config = lab.get_config(f"{text},target={target}")
                        config.update_from_flattened_dict(SMALL)
                        config.model.source, config.task.seed = LAB_TARGETS[target], seed
                        config.evals.tasks = tuple(t for t in ("lab-countdown", *LAB_PRIOR) if t != target)
                    else:
                        config = TARGETS[target].get_config(text)
                        config.evals.tasks = PRIOR
                    yield Case.of(config, target=target, N=population, AWD=anchor, seed=seed)


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """Mean prior accuracy against the drift of a weight, for every evaluation of every run, one panel per target."""
    targets, populations = (sorted({line[name] for line in lines}) for name in ("target", "N"))
    drawing = Figure(figsize=(max(1.2 + 3.6 * len(targets), 5.8), 3.9), layout="constrained", dpi=150)
    for axes, target in zip(drawing.subplots(1, len(targets), sharey=True, squeeze=False)[0], targets, strict=True):
        for marker, population in zip("os^", populations, strict=False):
            for anchor, face in (("none", "none"), ("l2", "0.3")):
                mine = [x for x in lines if (x["target"], x["N"], x["AWD"]) == (target, population, anchor)]
                later = [line for line in mine if line["step"] and line["kappa"] is not None]
                label = f"N = {population}" + (", AWD" if anchor == "l2" else "")
                axes.scatter(
                    [line["kappa"] for line in later], [line["prior"] for line in later],
                    marker=marker, facecolors=face, edgecolors="0.2", label=label,
                )  # fmt: skip
        base = [line["prior"] for line in lines if line["target"] == target and not line["step"]]
        axes.axhline(sum(base) / len(base), color="black", ls=":", lw=1, label="base model")
        axes.set(xlabel="κ, the drift of a weight in σ", title=f"trained on {target}", ylim=(0, 1.03))
        axes.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("mean accuracy on prior tasks")
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    drawing.savefig(path)


if __name__ == "__main__":
    main(__doc__, "forgetting_grid", cases, labels=("target", "N", "AWD"), figure=figure)
