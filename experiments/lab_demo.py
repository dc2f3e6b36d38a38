"""What does ES forget, what does AWD retain, and is the task or the random walk the cause of forgetting?

It makes three runs of the laboratory model, a table, a figure, and a sentence.

Command:  make demo, or python -m experiments.lab_demo --out=runs/demo
Cost:     66 s on 2 CPU cores, 88 s on one of 2 shared ones, after the packages are installed.
Result:   seed 0, after 300 steps: base model target .040, prior .996; ES .505, .329; ES + AWD .555, .835; random
          rewards .040, .361. More seeds: docs/study.md.
"""

import argparse
import shutil
import sys
from pathlib import Path

from configs.lab import get_config
from es_jax.plotting import accuracies, prior_accuracy, target_against_prior
from es_jax.rundir.metrics import read_jsonl
from es_jax.tasks.lab import PRIOR
from es_jax.training.loop import run
from experiments.runs import done, plain_errors

RUNS = {"ES": "", "ES + AWD": "anchor=l2", "ES, random rewards": "rewards=random"}
TARGET = "lab-countdown"


def sentence(target: dict[str, float], prior: dict[str, float], base: float) -> str:
    """The conclusion from the numbers, whatever they are."""
    lost = {label: base - value for label, value in prior.items()}
    kept = lost["ES"] - lost["ES + AWD"]
    drift = lost["ES, random rewards"]
    change = target["ES + AWD"] - target["ES"]
    if lost["ES"] < 0.05:
        return (
            f"ES lost {lost['ES']:.2f} of the prior tasks' accuracy of {base:.2f}, which is too little to compare; "
            "run longer."
        )
    cause = "the random walk causes forgetting, not the task" if drift > 0.5 * lost["ES"] else "the task matters"
    return (
        f"ES lost {lost['ES']:.2f} of the prior tasks' accuracy of {base:.2f}. Random rewards, which teach nothing, "
        f"lost {drift:.2f}, so {cause}. AWD {'kept' if kept > 0 else 'lost'} {abs(kept):.2f} more of it than ES "
        f"alone, with {abs(change):.2f} {'more' if change >= 0 else 'less'} accuracy on the target."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folders = {
        label: args.out / label.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-") for label in RUNS
    }
    with plain_errors(traceback=False):
        for label, argument in RUNS.items():
            print(f"\n{label}", file=sys.stderr)
            if done(folders[label]):  # a demo is there to be watched: a finished one starts again
                shutil.rmtree(folders[label])
            run(get_config(f"{argument},steps={args.steps},seed={args.seed}"), folders[label])
    target = {label: float(accuracies(folder, TARGET)[1][-1]) for label, folder in folders.items()}
    prior = {label: float(prior_accuracy(folder, PRIOR)[-1]) for label, folder in folders.items()}
    base = float(prior_accuracy(folders["ES"], PRIOR)[0])
    print(f"\n{'after ' + str(args.steps) + ' steps':20} target   prior   drift (theory)")
    print(f"{'base model':20} {accuracies(folders['ES'], TARGET)[1][0]:6.3f}  {base:6.3f}   0")
    for label, folder in folders.items():
        row = read_jsonl(folder / "metrics.jsonl")[-1]
        print(f"{label:20} {target[label]:6.3f}  {prior[label]:6.3f}   {row['drift']:.3f} ({row['drift_theory']:.3f})")
    print(f"\ntarget: accuracy on {TARGET}, 200 unseen problems; prior: mean over {len(PRIOR)} tasks not trained on")
    print(f"figure: {target_against_prior(folders, args.out / 'forgetting.png', prior=PRIOR)}")
    print(f"\n{sentence(target, prior, base)}")


if __name__ == "__main__":
    main()
