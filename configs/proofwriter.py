"""ProofWriter, a target of arXiv 2605.30148: true, false or unknown; N = 30, σ = 1e-3, α = 5e-4, 500 steps.

Command:  python -m es_jax.train --config=configs/proofwriter.py:qwen2.5-3b,anchor=l2 --workdir=runs/proofwriter
Arguments: configs/common.py. Rows: tasksource/proofwriter from the hub, or data=DIR with train and test parquet.
          The word small sets a size for a CPU: proofwriter.py:smollm2,small (`make smollm2` fetches the model).
Needs:    the published setting, memory and time: not yet run. Prompts of deep theories need
          decode.max_prompt_tokens 1024.
Reached:  the published setting: not yet run. Small (smollm2,small,data=DIR), 3 steps of 19 s on 2 CPU cores: mean
          reward .19, .19 and .25; drift 4.101 as in theory; held-out accuracy .125 of 8 rows before and after.
"""

from configs.common import configure

SMALL = dict(
    task__train_size=4,
    es__population=4,
    decode__max_prompt_tokens=512,
    decode__max_new_tokens=96,
    train__steps=3,
    train__checkpoint_every=3,
    evals__every=3,
    evals__rows=8,
)


def get_config(argument: str = ""):
    return configure(
        argument, model="qwen2.5-3b", small=SMALL, task__name="proofwriter", decode__max_prompt_tokens=1024
    )
