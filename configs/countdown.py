"""Countdown, as in arXiv 2605.30148: reach a target with 3 or 4 numbers, N = 30, σ = 1e-3, α = 5e-4, 500 steps.

Command:  python -m es_jax.train --config=configs/countdown.py:qwen2.5-3b,anchor=l2 --workdir=runs/countdown
Arguments: configs/common.py. Rows: data=DIR with train.parquet and test.parquet; generated without.
          The word small sets a size for a CPU: countdown.py:smollm2,small,anchor=l2 (`make smollm2` fetches the model).
Needs:    the published setting, memory and time: not yet run. Small: 104 s a step on 2 shared CPU cores.
Reached:  the published setting: not yet run. Small, real rows, seed 0, 10 steps, killed after 5 and resumed: mean
          reward 0 before and after, every step (spread 0). SmolLM2-135M closes no think block and writes no answer
          block, so all rewards are equal, their weights exactly zero, and nothing moves. With es.rewards=random,
          kappa=1, 4 rows and 16 new tokens (51 s a step): drift 7.763 after 10 steps, theory 7.764. See dev/LOG.md.
GRPO:     countdown.py:grpo, published defaults; not yet run. Small (smollm2,small,grpo,prompts=4), real rows,
          4 rollouts each, 64 new tokens, on 2 CPU cores: a step takes 40.7 s (rollouts 16.6, update 24.1), the first
          76.6 s with its compilation; 5.3 GB at most. Mean reward .0013 and .0044, drift 0.0162 after 2 steps.
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
