"""Countdown, as in arXiv 2605.30148: reach a target with 3 or 4 numbers.

N = 30 members, noise scale σ = 1e-3, learning rate α = 5e-4, 500 steps.

Command:  python -m es_jax.train --config=configs/countdown.py:qwen2.5-3b,anchor=l2 --workdir=runs/countdown
Arguments: see configs/common.py. With data=DIR, rows come from train.parquet and test.parquet there. Without it, they
          are generated. The word small sets a size for a CPU: countdown.py:smollm2,small,anchor=l2 (`make smollm2`
          fetches the model).
Needs:    the memory and time of the published setting are not known yet. The small size takes 104 s a step on 2 shared
          CPU cores.
Reached:  the published setting has not been run yet. The small size was run on real rows with seed 0 for 10 steps,
          killed after 5 and resumed. The mean reward was 0 before, after and in every step, with no spread.
          SmolLM2-135M closes no think block and writes no answer block. So all rewards are equal, their weights are
          exactly zero, and nothing moves. With es.rewards=random, kappa=1, 4 rows and 16 new tokens (51 s a step), the
          drift after 10 steps was 7.763, and 7.764 in theory. See dev/LOG.md.
GRPO:     countdown.py:grpo has the published defaults, and has not been run yet. The small size
          (smollm2,small,grpo,prompts=4) was run on real rows with 4 rollouts each and 64 new tokens, on 2 CPU cores. A
          step takes 40.7 s (rollouts 16.6, update 24.1), and the first 76.6 s with its compilation. It needs 5.3 GB at
          most. The mean reward was .0013 and .0044, and the drift after 2 steps 0.0162.
"""

from configs.common import configure

SMALL = dict(
    task__train_size=8,
    es__population=4,
    grpo__rollouts=4,
    grpo__micro_batch=4,
    decode__max_prompt_tokens=256,
    decode__max_new_tokens=64,
    train__steps=10,
    train__checkpoint_every=4,
    evals__every=10,
    evals__rows=8,
)


def get_config(argument: str = ""):
    return configure(argument, model="qwen2.5-3b", small=SMALL, task__name="countdown")
