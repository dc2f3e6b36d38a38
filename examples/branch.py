"""A branch: a new run that starts from a step of another run, with other fields.

    python examples/branch.py [--small] [--out=runs/branching]

The first run learns Countdown without an anchor. Three branches start from its middle. One has the same fields. One has
a lower learning rate α. One is pulled toward the laboratory model, with which the first run began.
"""

import argparse
from pathlib import Path

from es_jax import run
from es_jax.rundir.metrics import read_jsonl

PRIOR = ("lab-add", "lab-sort", "lab-compare")
CHANGES = {
    "as it was": {},
    "α / 5": {"learning_rate": 0.001},
    "anchored": {"anchor": {"penalty": "l2", "kappa": 1.0}},
}


def config_of(steps, small, *, optim=None, seed=0):
    return {
        "model": {"source": "lab"},
        "task": {"name": "lab-countdown", "train_size": 8 if small else 400, "prompts_per_step": None if small else 64},
        "es": {"population": 4 if small else 8, "sigma": 0.01},
        "optim": {"learning_rate": 0.005} | (optim or {}),
        "decode": {"max_prompt_tokens": 16, "max_new_tokens": 6, "members_at_once": 4},
        "train": {"steps": steps, "checkpoint_every": steps, "seed": seed},
        "evals": {"every": steps, "rows": 8 if small else 200, "tasks": PRIOR},
    }


def accuracies(folder):
    """The accuracy on the target, and the mean of those on the tasks known before, after the last step."""
    last = {path.stem: read_jsonl(path)[-1]["accuracy"] for path in Path(folder, "evals").glob("*.jsonl")}
    return last["lab-countdown"], sum(last[name] for name in PRIOR) / len(PRIOR)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/branching")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    out, steps = Path(options.out), 2 if options.small else 200
    run(config_of(steps, options.small), out / "first")
    print("branch of the middle   target  known before")
    for number, (name, optim) in enumerate(CHANGES.items()):
        folder = out / f"branch-{number}"
        config = config_of(steps // 2, options.small, optim=optim, seed=1)  # another seed than the first run's
        run(config, folder, branch_from=f"{out / 'first'}@{steps // 2}")
        target, prior = accuracies(folder)
        print(f"{name:22} {target:6.3f} {prior:13.3f}")


if __name__ == "__main__":
    main()
