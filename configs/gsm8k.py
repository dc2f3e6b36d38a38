"""GSM8K, a target task of arXiv 2605.30148: grade-school word problems.

N = 30 members, noise scale σ = 1e-3, learning rate α = 5e-4, 500 steps.

Command:  python -m es_jax.train --config=configs/gsm8k.py:qwen2.5-3b,anchor=l2 --workdir=runs/gsm8k
Arguments: see configs/common.py. Rows come from openai/gsm8k on the hub. With data=DIR they come from train.parquet and
          test.parquet there. The word small sets a size for a CPU: gsm8k.py:smollm2,small (`make smollm2` fetches the
          model).
Needs:    the memory and time of the published setting are not known yet.
Reached:  the published setting has not been run yet. The small size (smollm2,small,data=DIR) was run for 3 steps of
          22 s on 2 CPU cores. All rewards were 0, so nothing moved. The held-out accuracy was .125 of 8 rows before and
          after.
"""

from configs.common import configure

SMALL = dict(
    task__train_size=4,
    es__population=4,
    decode__max_prompt_tokens=256,
    decode__max_new_tokens=96,
    train__steps=3,
    train__checkpoint_every=3,
    evals__every=3,
    evals__rows=8,
)


def get_config(argument: str = ""):
    return configure(argument, model="qwen2.5-3b", small=SMALL, task__name="gsm8k")
