"""Question: does what ES forgets, and what AWD keeps, depend on the model family?

Models × targets × AWD. At laboratory size the models are of three families with the laboratory's sizes and pretraining.

Command:  python -m experiments.families [--size=full] [--index=$I] [--docs=docs/lab]
          laboratory: first python -m experiments.pretrain_lab --family=qwen3 --out=runs/lab-qwen3, and gemma2
Cost:     laboratory: not yet run. Full: 4 models × 3 targets × 2 × seeds of 500 steps, not yet run.
Result:   not yet run, at either size.
"""

from collections.abc import Iterator, Sequence

from configs import lab
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


if __name__ == "__main__":
    main(__doc__, "families", cases, labels=("model", "target", "AWD"))
