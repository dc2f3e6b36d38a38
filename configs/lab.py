"""The laboratory: 90 thousand weights that know seven small tasks and guess at an eighth, a small Countdown.

The paper's science in seconds: ES brings the target out and forgets the others, AWD keeps them, and random rewards
forget as much as real ones. N = 8, σ = 0.01, α = 0.005, 64 fresh prompts a step, 300 steps.

Command:  python -m es_jax.train --config=configs/lab.py:anchor=l2 --workdir=runs/lab
Arguments: configs/common.py: population, anchor=none|l2|l1, strength, kappa, target, rewards=random, antithetic, seed,
          steps.
          Other pretraining seeds: experiments/pretrain_lab.py, then --config.model.source=DIR.
Needs:    26 to 30 s on one of 2 shared CPU cores. When all is compiled anew: 11.7 s until the first step is done
          (imports, loading, compilation), 12 s for the other 299, the rest 13 evaluations of eight tasks. In all steps
          decoding takes 6.8 s, perturbing 3.0, updates 0.4; for 7.4 no program runs (Python, compilation), grading 1.2.
Reached:  seed 0, anchor=none: target .040 → .500, mean prior .996 → .406, drift 9.170 (theory 9.208);
          anchor=l2: target .605, prior .866, drift 3.733 (theory 3.726). More seeds: docs/study.md.
GRPO:     lab.py:grpo, AdamW 1e-4, 64 prompts × 8 rollouts a step: seeds 0 to 2, 40 steps: target .040 → .710 ± .031,
          mean prior .996 → .959 ± .005, drift 0.74; about 12 CPU seconds, compilation aside. docs/study.md.
"""

from configs.common import configure
from es_jax.tasks.lab import PRIOR

STRENGTH = {"l2": 2.0, "l1": 0.02}  # a step takes away αλ = 1 % of the drift, or 1e-4 of each weight
GRPO = dict(optim__learning_rate=1e-4, grpo__rollouts=8, grpo__mini_batch=16, grpo__micro_batch=128)
GRPO_STRENGTH = {"l2": 25.0, "l1": 0.25}  # the same a step, which has four updates of 16 prompts each


def get_config(argument: str = ""):
    return configure(
        argument,
        model="lab",
        grpo=GRPO,
        strengths=STRENGTH,
        grpo_strengths=GRPO_STRENGTH,
        task__name="lab-countdown",
        task__train_size=400,
        task__prompts_per_step=64,
        es__population=8,
        es__sigma=0.01,
        optim__learning_rate=0.005,
        decode__max_prompt_tokens=16,
        decode__max_new_tokens=6,
        decode__members_at_once=4,
        train__steps=300,
        train__checkpoint_every=100,
        evals__tasks=PRIOR,
    )
