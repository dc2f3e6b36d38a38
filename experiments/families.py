"""Question: do forgetting by ES, and its prevention by AWD, depend on the model family?

The grid is models × targets × AWD. At laboratory size the models come from three families, with the laboratory's sizes
and pretraining.

Command:  python -m experiments.families [--size=full] [--index=$I] [--docs=docs/lab]
          laboratory: first python -m experiments.pretrain_lab --family=qwen3 --out=runs/lab-qwen3, and gemma2
Cost:     laboratory: 12 runs in 2 minutes on 2 CPU cores, the models 4 minutes each, with other work. Full:
          4 models × 3 targets × 2 × seeds of 500 steps, not yet run. By plans of N = 32 with an anchor (docs/scale.md:
          bounds, every completion at its full 1024 tokens) 500 steps take at least 3.7 hours for 1.5B, 6.3 for 3B and
          13 for 7B on 16 v5e, and 1.8, 3.1 and 6.3 on eight H100; 0.5B is not planned yet.
Result:   laboratory, 2 seeds: every family forgets (prior −.27 to −.45), and AWD keeps .19 to .29 of it at the same
          target; docs/study.md. Full: not yet run.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import lab
from es_jax.plotting.figures import bar
from experiments.forgetting import ANCHORS, PRIOR, TARGETS
from experiments.runs import EVALS, Case, main

LAB = {"llama": "lab", "qwen3": "runs/lab-qwen3", "gemma2": "runs/lab-gemma2"}
FULL = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")
SMALL = {"task.prompts_per_step": 32, "train.steps": 120, "train.checkpoint_every": 120, "evals.every": 60} | EVALS


def cases(size: str, seeds: Sequence[int]) -> Iterator[Case]:
    """Every run."""
    for seed in seeds:
        for model in LAB if size == "lab" else FULL:
            for target in ("lab-countdown",) if size == "lab" else TARGETS:
                for anchor, argument in ANCHORS.items():
                    text = f"seed={seed},{argument}".rstrip(",")
                    if size == "lab":
                        config = lab.get_config(text)
                        config.model.source = LAB[model]
                        config.update_from_flattened_dict(SMALL)
                    else:
                        config = TARGETS[target].get_config(f"{model},{text}")
                        config.evals.tasks = PRIOR
                    yield Case.of(config, model=model, target=target, AWD=anchor, seed=seed)


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """Target and mean prior accuracy by model: for the base model, and at the end of ES and ES + AWD; errors over
    runs."""
    last = max(line["step"] for line in lines)
    models = list(dict.fromkeys(line["model"] for line in lines))
    drawing = Figure(figsize=(8.0, 3.6), layout="constrained", dpi=150)
    kinds = {"base model": (0, None), "ES": (last, "none"), "ES + AWD l2": (last, "l2")}
    for axes, column in zip(drawing.subplots(1, 2, sharey=True), ("accuracy", "prior"), strict=True):
        for i, (label, (step, anchor)) in enumerate(kinds.items()):
            groups = [
                [x[column] for x in lines if (x["model"], x["step"]) == (m, step) and anchor in (None, x["AWD"])]
                for m in models
            ]
            means = [np.mean(values) if values else np.nan for values in groups]
            errors = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else np.nan for v in groups]
            axes.bar(
                np.arange(len(models)) + (i - 1) * 0.27, means, 0.25, yerr=errors, capsize=2, label=label, **bar(i)
            )
        axes.set_xticks(range(len(models)), models)
        title = "target" if column == "accuracy" else "mean of the prior tasks"
        axes.set(xlabel="family of the model", title=title, ylim=(0, 1.03))
        axes.grid(alpha=0.3, axis="y")
    drawing.axes[0].set_ylabel("held-out accuracy")
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    drawing.savefig(path)


if __name__ == "__main__":
    main(__doc__, "families", cases, labels=("model", "target", "AWD"), figure=figure)
