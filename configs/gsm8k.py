"""GSM8K, a target of arXiv 2605.30148: word problems of grade school; N = 30, σ = 1e-3, α = 5e-4, 500 steps.

Command:  python -m es_jax.train --config=configs/gsm8k.py:qwen2.5-3b,anchor=l2 --workdir=runs/gsm8k
Arguments: configs/common.py. Rows: openai/gsm8k from the hub, or data=DIR with train.parquet and test.parquet.
          The word small sets a size for a CPU: gsm8k.py:smollm2,small (`make smollm2` fetches the model).
Needs:    the published setting, memory and time: not yet run.
Reached:  the published setting: not yet run. Small (smollm2,small,data=DIR), 3 steps of 22 s on 2 CPU cores: rewards 0,
          so nothing moves; held-out accuracy .125 of 8 rows before and after.
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
