"""JSON facts: on a CPU, SmolLM2 learns to answer with the JSON object that was asked for and nothing else.

Command:  python -m es_jax.train --config=configs/json_facts.py --workdir=runs/json
Arguments: see configs/common.py. rewards=random is the control.
Needs:    SmolLM2 (`make smollm2`) and 5 GB. A step takes about 17 CPU seconds, which is 8 s on two cores.
Reached:  see docs/first-run.md.
"""

from configs.common import configure


def get_config(argument: str = ""):
    return configure(
        argument,
        model="smollm2",
        task__name="json-facts",
        task__train_size=480,
        task__prompts_per_step=8,
        es__noise="low_rank",
        es__population=64,
        es__prompts_per_member=1,
        es__sigma=2e-3,
        optim__learning_rate=2e-3,
        decode__max_prompt_tokens=56,
        decode__max_new_tokens=24,
        train__steps=30,
        train__checkpoint_every=30,
        evals__every=15,
        evals__rows=128,
    )
