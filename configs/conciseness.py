"""Conciseness, as in arXiv 2509.24372: answer in as many characters as the target text has.

Command:  python -m es_jax.train --config=configs/conciseness.py --workdir=runs/conciseness
Reached:  not yet run.
"""

from configs.common import configure


def get_config(argument: str = ""):
    return configure(
        argument,
        model="smollm2",
        task__name="conciseness",
        task__train_size=8,
        es__population=8,
        decode__max_prompt=64,
        decode__max_new=32,
        train__steps=25,
        train__checkpoint_every=5,
        evals__every=5,
        evals__size=16,
    )
