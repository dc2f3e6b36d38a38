"""Conciseness, as in arXiv 2509.24372: the model learns to answer in as many characters as the target text has.

Command:  python -m es_jax.train --config=configs/conciseness.py --workdir=runs/conciseness
Needs:    SmolLM2 (`make smollm2`), and 43 minutes on 2 CPU cores (100 s a step, 21 tokens/s).
Reached:  with seed 0, the mean reward rose from −126.9 (steps 1–5) to −85.2 (steps 21–25). The spread of the members'
          rewards was 5 to 15. The held-out reward went from −119.9 ± 10.2 to −114.3 ± 11.9 on 16 rows. The drift was
          10.25, as in theory (10.25).
"""

from configs.common import configure


def get_config(argument: str = ""):
    return configure(
        argument,
        model="smollm2",
        task__name="conciseness",
        task__train_size=8,
        es__population=8,
        decode__max_prompt_tokens=64,
        decode__max_new_tokens=32,
        train__steps=25,
        train__checkpoint_every=5,
        evals__every=5,
        evals__rows=16,
    )
