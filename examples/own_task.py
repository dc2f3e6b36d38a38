"""A task of your own: a class with rows and a score, on which a model is trained and evaluated.

    python examples/own_task.py [--small] [--out=runs/own-task]

The laboratory model is inside the package. It sorts five digits in ascending order, and here it learns descending
order. The reward is the share of digits in the right place. A graded reward teaches more than one that is only right or
wrong.
"""

import argparse
import random

from es_jax import SimpleTask, complete, load_step, run


class Downwards(SimpleTask):
    """The right answer to `D14914=` is `94411`."""

    def rows(self, split):
        rng = random.Random(split)
        for _ in range(400 if split == "train" else 100):
            digits = [rng.choice("0123456789") for _ in range(5)]
            yield f"D{''.join(digits)}=", "".join(sorted(digits, reverse=True))

    def score(self, example, completion):
        right = sum(a == b for a, b in zip(completion, example.answer, strict=False))
        return right / max(len(example.answer), len(completion))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/own-task")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    config = {
        "model": {"source": "lab"},
        "task": {"train_size": 8 if options.small else 400, "prompts_per_step": None if options.small else 64},
        "es": {"population": 4 if options.small else 16, "sigma": 0.01, "antithetic": True},
        "optim": {"learning_rate": 0.005, "anchor": {"penalty": "l2", "kappa": 3.0}},
        "decode": {"max_prompt_tokens": 16, "max_new_tokens": 6, "members_at_once": 4},
        "train": {"steps": 2 if options.small else 300, "checkpoint_every": 300},
        "evals": {"every": 1 if options.small else 300, "rows": 8 if options.small else 100},
    }
    result = run(config, options.out, task=Downwards())
    example = Downwards().test(1)[0]
    print(f"held-out reward at step {result.step}: {result.heldout['reward']:.3f}")
    for step in (0, result.step):
        answer = complete(load_step(options.out, step), example.prompt, max_new_tokens=6)
        print(f"step {step}: {example.prompt}{answer} (wanted: {example.answer})")


if __name__ == "__main__":
    main()
