"""Conciseness, as in arXiv 2509.24372: answer in as many characters as the target text has.

Command:  python -m es_jax.train --config=configs/conciseness.py --workdir=runs/conciseness
Needs:    SmolLM2 (`make smollm2`); 43 minutes on 2 CPU cores (100 s a step, 21 tokens/s).
Reached:  seed 0: mean reward from −126.9 (steps 1–5) to −85.2 (steps 21–25), spread of the members 5 to 15; held-out
          reward −119.9 ± 10.2 → −114.3 ± 11.9 on 16 rows; drift 10.25, theory 10.25.
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
