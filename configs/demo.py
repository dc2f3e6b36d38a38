"""The demo of `make demo`: a real model, a few steps, a few minutes on a laptop CPU.

SmolLM2-135M-Instruct learns to answer in fewer characters, with AWD: N = 4, 2 prompts, 16 new tokens, 4 steps. It
shows the parts at work; four steps are too few to learn much.

Command:  make demo
Needs:    7 minutes from a fresh clone on 2 busy CPU cores, set-up included; 41 to 62 s a step.
Reached:  mean reward −59.1, −56.8, −57.0, −57.6 (members ± 1.5 to 3.9): nothing learnt; drift 5.363, theory 5.363.
"""

from configs.common import configure


def get_config(argument: str = ""):
    return configure(
        f"anchor=l2,drift=1.0,{argument}",
        model="smollm2",
        task__name="conciseness",
        task__train_size=2,
        es__population=4,
        decode__max_prompt=64,
        decode__max_new=16,
        train__steps=4,
        train__checkpoint_every=2,
        evals__every=4,
        evals__size=2,
    )
