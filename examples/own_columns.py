"""A data set of your own, by its columns: a template for the prompt and the name of the answer's column, and no grader.

    python examples/own_columns.py [--small] [--out=runs/own-columns]

The program writes a folder with train.csv and test.csv. It then trains the laboratory model to say whether a number is
even.
"""

import argparse
import csv
import random
from pathlib import Path

from es_jax import run


def write_rows(folder):
    """Writes two files with the columns number and even."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(0).sample(range(1000, 10000), 500)
    for split, part in {"train": numbers[:400], "test": numbers[400:]}.items():
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["number", "even"])
            writer.writerows([n, "n" if n % 2 else "y"] for n in part)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/own-columns")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    rows = Path(options.out + "-rows")
    write_rows(rows)
    config = {
        "model": {"source": "lab"},
        "task": {
            "name": "rows",
            "data_dir": str(rows),
            "prompt": "E{number}=",
            "answer": "even",
            "grader": "exact",
            "train_size": 8 if options.small else 400,
            "prompts_per_step": None if options.small else 64,
        },
        "es": {"population": 4 if options.small else 16, "sigma": 0.01, "antithetic": True},
        "optim": {"learning_rate": 0.005, "anchor": {"penalty": "l2", "kappa": 3.0}},
        "decode": {"max_prompt_tokens": 16, "max_new_tokens": 2, "members_at_once": 4},
        "train": {"steps": 2 if options.small else 300, "checkpoint_every": 300},
        "evals": {"every": 1 if options.small else 300, "rows": 8 if options.small else 100},
    }
    result = run(config, options.out)
    row = result.heldout
    print(f"held-out accuracy at step {row['step']}: {row['accuracy']:.3f} ± {row['accuracy_se']:.3f}, {row['n']} rows")


if __name__ == "__main__":
    main()
