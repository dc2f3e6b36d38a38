"""Question: how does the strength of AWD trade the target against the prior tasks, and is κ the right parameter?

It compares l2 and l1 at the same κ (how many σ a weight may drift in the long run; λ follows from it), on a target near
θ₀ and on a target far from it: the laboratory's countdown with a base model that echoes 60 % of the time, and with one
that echoes 90 %.

Command:  python -m experiments.strength_sweep [--size=full] [--index=$I] [--docs=docs/lab]
          laboratory: first python -m experiments.pretrain_lab --echo=0.9 --out=runs/lab-far
Cost:     laboratory: 4 to 10 s a run on 2 idle CPU cores, 14 runs a seed. Full: not yet run; by
          the plan of Qwen2.5-3B on eight H100 (docs/scale.md, a bound) at least 43 hours a seed.
Result:   laboratory, seeds 0 and 1: at κ = 1 l2 and l1 keep .92 to .94 of the prior tasks on both targets (.60 and .53
          without AWD). The near target is learnt as well as without AWD, the far one half as well. At κ = 0.3 nothing
          is learnt. docs/study.md. Full: not yet run.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import countdown, gsm8k, lab
from experiments.runs import EVALS, Case, main

KAPPAS = (0.3, 1.0, 3.0)
NAMES = {"accuracy": "target", "prior": "mean prior"}
MODELS = {"near": "lab", "far": "runs/lab-far"}
FULL = {"near": countdown, "far": gsm8k}
SMALL = {"task.prompts_per_step": 32, "train.steps": 120, "train.checkpoint_every": 120, "evals.every": 60} | EVALS


def cases(size: str, seeds: Sequence[int]) -> Iterator[Case]:
    """Every run of the sweep; κ = inf means no anchor."""
    settings = [("none", float("inf"), ""), *((p, k, f"anchor={p},kappa={k}") for p in ("l2", "l1") for k in KAPPAS)]
    for seed in seeds:
        for target, model in MODELS.items():
            for penalty, kappa, argument in settings:
                text = f"seed={seed},{argument}".rstrip(",")
                config = lab.get_config(text) if size == "lab" else FULL[target].get_config(text)
                if size == "lab":
                    config.model.source = model
                    config.update_from_flattened_dict(SMALL)
                yield Case.of(config, target=target, penalty=penalty, κ=kappa, seed=seed)


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """Target and prior accuracy against κ, one panel per target, with lines for the base model and for no anchor."""
    drawing = Figure(figsize=(8.4, 3.4), layout="constrained", dpi=150)
    targets = list(dict.fromkeys(line["target"] for line in lines))
    last = max(line["step"] for line in lines)
    for axes, target in zip(drawing.subplots(1, len(targets), sharey=True, squeeze=False)[0], targets, strict=True):
        mine = [line for line in lines if line["target"] == target]
        for column, color in (("accuracy", "tab:orange"), ("prior", "tab:blue")):
            of = lambda p, k, mine=mine, column=column: [  # noqa: E731
                x[column] for x in mine if (x["penalty"], x["κ"], x["step"]) == (p, k, last)
            ]
            for penalty, style in (("l2", "-o"), ("l1", "--s")):
                kappas = [k for k in KAPPAS if of(penalty, k)]
                means, label = [np.mean(of(penalty, k)) for k in kappas], f"{NAMES[column]}, {penalty}"
                axes.plot(kappas, means, style, color=color, label=label)
            free = of("none", float("inf"))
            if free:
                axes.axhline(
                    np.mean(of("none", float("inf"))), color=color, ls="-.", lw=1, label=f"{NAMES[column]}, λ = 0"
                )
            base = [x[column] for x in mine if x["step"] == 0]
            axes.axhline(np.mean(base), color=color, ls=":", lw=1, label=f"{NAMES[column]}, base")
        axes.set(xscale="log", xlabel="κ, the allowed drift of a weight in σ", title=f"target {target}", ylim=(0, 1.03))
        axes.set_xticks(KAPPAS, [f"{kappa:g}" for kappa in KAPPAS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.get_figure().axes[0].set_ylabel("held-out accuracy")
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    drawing.savefig(path)


if __name__ == "__main__":
    main(__doc__, "strength_sweep", cases, labels=("target", "penalty", "κ"), figure=figure)
