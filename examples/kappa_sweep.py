"""A sweep of κ, with a figure. κ says how far a weight may drift in the long run, in units of the noise scale σ.

    python examples/kappa_sweep.py [--small] [--out=runs/kappa]      # needs the extra [report]

The laboratory model learns Countdown and forgets what it knew. κ trades one for the other. There is a run for each κ
and one without an anchor. A finished run is not repeated. `python -m es_jax.report runs/kappa/*` makes a page of them.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from es_jax import run
from es_jax.rundir.metrics import read_jsonl

KAPPAS = (0.3, 1.0, 3.0, None)
PRIOR = ("lab-add", "lab-sort", "lab-compare")


def config_of(kappa, small):
    return {
        "model": {"source": "lab"},
        "task": {"name": "lab-countdown", "train_size": 8 if small else 400, "prompts_per_step": None if small else 64},
        "es": {"population": 4 if small else 8, "sigma": 0.01},
        "optim": {
            "learning_rate": 0.005,
            "anchor": {"penalty": "none"} if kappa is None else {"penalty": "l2", "kappa": kappa},
        },
        "decode": {"max_prompt_tokens": 16, "max_new_tokens": 6, "members_at_once": 4},
        "train": {"steps": 1 if small else 300, "checkpoint_every": 300},
        "evals": {"every": 1 if small else 300, "rows": 8 if small else 200, "tasks": PRIOR},
    }


def accuracies(folder):
    """The accuracy on the target, and the mean of those on the tasks known before, after the last step."""
    last = {path.stem: read_jsonl(path)[-1]["accuracy"] for path in Path(folder, "evals").glob("*.jsonl")}
    return last["lab-countdown"], sum(last[name] for name in PRIOR) / len(PRIOR)


def draw(rows, path):
    """Plots both accuracies against κ."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    labels = ["none" if kappa is None else f"{kappa:g}" for kappa, _, _ in rows]
    for column, name in ((1, "target: Countdown"), (2, "known before, mean of three")):
        axes.plot(labels, [row[column] for row in rows], "o-", label=name)
    axes.set(xlabel="κ", ylabel="held-out accuracy", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/kappa")
    parser.add_argument("--small", action="store_true", help="two runs of one step, to see that it runs")
    options = parser.parse_args(argv)
    rows = []
    for kappa in KAPPAS[::3] if options.small else KAPPAS:
        folder = Path(options.out, f"kappa={kappa}")
        run(config_of(kappa, options.small), folder)
        rows.append((kappa, *accuracies(folder)))
    print("κ      target  known before")
    for kappa, target, prior in rows:
        print(f"{'none' if kappa is None else f'{kappa:g}':5} {target:7.3f} {prior:13.3f}")
    draw(rows, Path(options.out, "kappa.png"))
    print(f"the figure is {Path(options.out, 'kappa.png')}")


if __name__ == "__main__":
    main()
