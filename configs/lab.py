"""The laboratory: a Llama of 90 thousand weights that knows seven small tasks and guesses at an eighth.

It shows in seconds what the paper is about. The eighth task, the target, is a small Countdown. ES learns the target and
forgets the other tasks. AWD keeps them. Random rewards forget as much as real ones. N = 8 members, noise scale
σ = 0.01, learning rate α = 0.005, 64 fresh prompts a step, 300 steps.

Command:  python -m es_jax.train --config=configs/lab.py:anchor=l2 --workdir=runs/lab
Arguments: population, anchor=none|l2|l1, strength, kappa, target, rewards=random, antithetic, seed and steps; see
          configs/common.py. For another pretraining seed, run experiments/pretrain_lab.py and set
          --config.model.source=DIR.
Needs:    26 to 30 s on one of 2 shared CPU cores. If everything is compiled anew, the first step is done after 11.7 s
          (imports, loading, compilation). The other 299 steps take 12 s, and 13 evaluations of eight tasks take the
          rest. In all steps together, decoding takes 6.8 s, perturbing 3.0, updates 0.4 and grading 1.2. For 7.4 s no
          program runs on the device (Python, compilation).
Reached:  seed 0 with anchor=none: accuracy on the target .040 → .500, mean over the prior tasks .996 → .406, drift
          9.170 (theory 9.208). With anchor=l2: target .605, prior .866, drift 3.733 (theory 3.726). docs/study.md has
          more seeds.
GRPO:     lab.py:grpo trains with AdamW at 1e-4, 64 prompts and 8 rollouts each a step. Seeds 0 to 2, 40 steps: target
          .040 → .710 ± .031, mean prior .996 → .959 ± .005, drift 0.74. It takes about 12 CPU seconds without
          compilation. See docs/study.md.
"""

from configs.common import configure
from es_jax.tasks.lab import PRIOR

STRENGTH = {"l2": 2.0, "l1": 0.02}  # a step removes αλ = 1 % of the drift (l2), or 1e-4 from each weight (l1)
GRPO = dict(optim__learning_rate=1e-4, grpo__rollouts=8, grpo__mini_batch=16, grpo__micro_batch=128)
GRPO_STRENGTH = {"l2": 25.0, "l1": 0.25}  # the same for a step of GRPO, which has four updates of 16 prompts each


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
