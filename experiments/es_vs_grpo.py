"""For the same rollouts, tokens or time, what do ES and GRPO learn and forget, and what does AWD do to each?

Both use the same base model, training rows, prompts, held-out rows and seeds; every step of either makes 512
completions of 64 prompts (ES: 8 members, greedy; GRPO: 8 samples a prompt). Two targets: lab-countdown on the shipped
model, and lab-sort on a model that answers it mostly by an echo.

Seconds are a method's median over all its steps, times the steps: a step's own may have shared the machine. `--seconds`
compares by them, `--kl` measures KL from the base model at every evaluation.

Command:  python -m experiments.pretrain_lab --seed=0 --target=sort --out=runs/lab-sort
          python -m experiments.es_vs_grpo --sort=runs/lab-sort --out=runs/es_vs_grpo --docs=docs/lab --seconds --kl
Cost:     all 36 runs and their KL: 8 minutes on 2 CPU cores.
Result:   docs/study.md
"""

import argparse
import csv
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from configs.lab import get_config
from es_jax.evals.kl import kl, sample
from es_jax.plotting import read_run
from es_jax.rundir.checkpoints import saved_steps
from es_jax.rundir.metrics import read_jsonl
from es_jax.tasks import get_task
from es_jax.tasks.lab import PRIOR
from es_jax.training.config import read_config
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from es_jax.weights.model import load_model
from es_jax.weights.tokenizer import encode_prompt
from experiments.runs import PRETRAINED, check_models, done, mean_se, plain_errors

ALL = ("lab-countdown", *PRIOR)
TARGETS = ("lab-countdown", "lab-sort")
ROWS = {  # AWD takes away 1 % of the drift a step, or 10 %; α of GRPO is 1e-4
    "ES": "",
    "ES + AWD": "anchor=l2",
    "GRPO": "grpo",
    "GRPO + AWD": "grpo,anchor=l2",
    "GRPO + AWD ×10": "grpo,anchor=l2,strength=250",
    "GRPO, α = 3e-5": "grpo,lr=3e-5",
}
BUDGETS = {"rollouts": "rollouts", "tokens": "generated tokens", "seconds": "seconds of steps"}
COLUMNS = ("target_task", "row", "seed", "step", *BUDGETS, "target", "prior", "drift", "kl")


def priors_of(target: str) -> tuple[str, ...]:
    """The tasks that pretraining taught and that are not trained."""
    return tuple(task for task in ALL if task != target)


def step_seconds(folders: Sequence[Path]) -> dict[str, float]:
    """Median seconds of a step of each method over its runs."""
    seconds: dict[str, list[float]] = {"es": [], "grpo": []}
    for folder in folders:
        method = json.loads((folder / "config.json").read_text())["config"]["method"]
        seconds[method] += [line["seconds"] for line in read_jsonl(folder / "metrics.jsonl")]
    return {method: float(np.median(values)) for method, values in seconds.items() if values}


def evaluations(folder: Path, target: str, *, each_step: dict[str, float], **labels: object) -> list[dict]:
    """A line for each evaluation of a run: what it had cost by then, and what it knew."""
    record = read_run(folder)
    config = record.config
    members = config.grpo.rollouts if config.method == "grpo" else config.es.population
    each, seconds = members * (config.task.prompts_per_step or config.task.train_size), each_step[config.method]
    tokens = np.cumsum([0] + [row["tokens"] for row in record.metrics])
    drift = [0.0] + [row["drift"] for row in record.metrics]
    return [
        labels
        | {"target_task": target, "step": step, "rollouts": step * each, "tokens": int(tokens[step])}
        | {"seconds": round(seconds * step, 1), "target": row["accuracy"]}
        | {"prior": round(float(np.mean([other["accuracy"] for other in prior])), 4), "drift": round(drift[step], 4)}
        for step, (row, *prior) in record.rows([target, *priors_of(target)]).items()
    ]


def add_kl(folder: Path, lines: list[dict], *, rows: int = 25) -> None:
    """KL(base ‖ now) a token into the lines whose weights there are: GRPO's checkpoints, all steps of ES.

    It is exact at each position of continuations that the base model sampled, of test rows of all eight tasks.
    """
    config = read_config(folder)
    steps = saved_steps(folder) if config.method == "grpo" else [line["step"] for line in lines]
    by_step = {line["step"]: line for line in lines if line["step"] in steps and line["step"]}
    model = load_model(config.model.source)
    prompts = [encode_prompt(model.tokenizer, e.prompt) for task in ALL for e in get_task(task).test(rows)]
    continuations = sample(
        model.config, model.params, prompts, stop_token_ids=model.stop_token_ids, slots=len(prompts), max_new_tokens=8
    )
    lines[0]["kl"] = 0.0
    for step, now in replay(folder, steps=sorted(by_step)):
        by_step[step]["kl"] = round(kl(model.config, model.params, now, prompts, continuations)["kl_exact_token"], 5)


def at(lines: Sequence[dict], budget: str, amount: float, column: str) -> float:
    """A column of one run when it had spent the amount, linear between evaluations."""
    return float(np.interp(amount, [x[budget] for x in lines], [x[column] for x in lines]))


def measured(mine: Sequence[dict]) -> list[dict]:
    """The lines with a KL."""
    return [x for x in mine if "kl" in x]


def near(mine: Sequence[dict], budget: str, amount: float) -> bool:
    """Whether a line stands shortly after the amount: what is between lines far apart is not known."""
    return any(amount <= x[budget] <= 1.3 * amount for x in mine)


def runs_of(lines: Sequence[dict], target: str) -> dict[tuple[str, int], list[dict]]:
    """The lines of each (row, seed) of a target."""
    out: dict[tuple[str, int], list[dict]] = {}
    for line in lines:
        if line["target_task"] == target:
            out.setdefault((line["row"], line["seed"]), []).append(line)
    return out


def table(lines: Sequence[dict], target: str, budgets: Sequence[str] = tuple(BUDGETS)) -> str:
    """Markdown: all rows at the largest amount of each budget that every run of the target reached."""
    runs = runs_of(lines, target)
    text = [f"| {target}, equal | of each | run | runs | target | prior | prior lost | drift | KL |", "|---" * 9 + "|"]
    base = next(iter(runs.values()))[0]
    text.append(f"| base | | | | {base['target']:.3f} | {base['prior']:.3f} | 0 | 0 | 0 |")
    for budget, label in ((budget, BUDGETS[budget]) for budget in budgets):
        amount = min(mine[-1][budget] for mine in runs.values())
        for row in ROWS:
            own = [mine for key, mine in runs.items() if key[0] == row]
            if not own:
                continue
            got = {c: [at(mine, budget, amount, c) for mine in own] for c in ("target", "prior", "drift")}
            lost = [mine[0]["prior"] - p for mine, p in zip(own, got["prior"], strict=True)]
            kls = [at(m, budget, amount, "kl") for m in map(measured, own) if near(m, budget, amount)]
            cells = [label, f"{amount:,.0f}", row, str(len(own)), mean_se(got["target"]), mean_se(got["prior"])]
            cells += [mean_se(lost), mean_se(got["drift"], 2), mean_se(kls) if kls else ""]
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def common_level(lines: Sequence[dict], target: str) -> float:
    """The highest target accuracy, in steps of 0.05, that every run of the target reached."""
    return math.floor(20 * min(max(x["target"] for x in mine) for mine in runs_of(lines, target).values())) / 20


def forgetting_at(lines: Sequence[dict], target: str, level: float) -> str:
    """Markdown: the prior accuracy lost, and the drift, when a run's target first reached the level."""
    text = [f"| {target} at {level:.2f} | reached by | prior lost | drift | rollouts |", "|---" * 5 + "|"]
    runs = runs_of(lines, target)
    for row in dict.fromkeys(key[0] for key in runs):
        own = [mine for key, mine in runs.items() if key[0] == row]
        crossings = [x for mine in own if (x := crossing(mine, level)) is not None]
        columns = (("lost", 3), ("drift", 2), ("rollouts", 0))
        cells = [mean_se([x[c] for x in crossings], digits) if crossings else "" for c, digits in columns]
        text.append(f"| {row} | {len(crossings)} of {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def crossing(mine: Sequence[dict], level: float) -> dict[str, float] | None:
    """What a run had lost and spent when its target first reached the level, linear between evaluations."""
    for before, after in itertools.pairwise(mine):
        if before["target"] < level <= after["target"]:
            part = (level - before["target"]) / (after["target"] - before["target"])
            now = {c: before[c] + part * (after[c] - before[c]) for c in ("prior", "drift", "rollouts")}
            return now | {"lost": mine[0]["prior"] - now["prior"]}
    return None


def figure(lines: Sequence[dict], path: Path) -> None:
    """Prior against target along training, a line a run; and drift against rollouts. A row for each target."""
    targets = [t for t in TARGETS if runs_of(lines, t)]
    picture = Figure(figsize=(9, 3.6 * len(targets)), layout="constrained", dpi=150)
    colors = dict(zip(ROWS, ("tab:orange", "tab:green", "tab:blue", "tab:purple", "tab:red", "tab:cyan"), strict=True))
    markers = dict(zip(ROWS, "os^vDX", strict=True))
    grid = picture.subplots(len(targets), 2, squeeze=False)
    for (left, right), target in zip(grid, targets, strict=True):
        for (row, seed), mine in runs_of(lines, target).items():
            style = {"color": colors[row], "alpha": 0.75, "linewidth": 1.2, "marker": markers[row], "markersize": 4}
            label = row if seed == min(s for r, s in runs_of(lines, target) if r == row) else None
            left.plot([x["target"] for x in mine], [x["prior"] for x in mine], label=label, **style)
            right.plot([x["rollouts"] / 1000 for x in mine], [x["drift"] for x in mine], **style)
        left.set(xlabel=f"held-out accuracy on {target}", ylabel="mean accuracy on prior tasks", ylim=(0, 1.03))
        right.set(xlabel="rollouts (thousands)", ylabel="‖θ − θ₀‖", yscale="symlog", title=target)
        right.set_yscale("symlog", linthresh=0.1)
        for axes in (left, right):
            axes.grid(alpha=0.3)
    picture.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    picture.savefig(path)


def train(target: str, row: str, seed: int, source: str, folder: Path, *, steps: int, every: int) -> None:
    """One run, or the rest of it."""
    config = get_config(f"{ROWS[row]},seed={seed},target={target},steps={steps}".removeprefix(","))
    config.model.source = source
    config.evals.tasks, config.evals.every, config.train.checkpoint_every = priors_of(target), every, every
    run(config, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sort", default="runs/lab-sort", help="model.source of the model whose target is lab-sort")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--steps", type=int, default=40, help="of GRPO, evaluated every 5")
    parser.add_argument("--es-steps", type=int, default=300, help="of ES, which are shorter, evaluated every 20")
    parser.add_argument("--out", type=Path, default=Path("runs/es_vs_grpo"))
    parser.add_argument("--docs", type=Path, default=Path("docs/lab"))
    parser.add_argument("--seconds", action="store_true", help="match by time too: for runs of one idle machine")
    parser.add_argument("--kl", action="store_true", help="also measure KL from the base model")
    parser.add_argument("--only-report", action="store_true", help="run nothing; report what is finished")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    args = parser.parse_args()
    with plain_errors(traceback=args.traceback):
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Run what is left, and report what is finished."""
    cases = [
        (args.out / target / re.sub(r"[^\w.-]+", "-", row) / str(seed), target, row, seed)
        for row, seed, target in itertools.product(args.rows, args.seeds, args.targets)
    ]
    left = [] if args.only_report else [case for case in cases if not done(case[0])]
    if any(target == "lab-sort" for _, target, *_ in left):
        check_models({args.sort: PRETRAINED["runs/lab-sort"]})
    for folder, target, row, seed in left:
        source = "lab" if target == TARGETS[0] else args.sort
        steps, every = (args.steps, 5) if "GRPO" in row else (args.es_steps, 20)
        train(target, row, seed, source, folder, steps=steps, every=every)
    finished, lines = [case for case in cases if done(case[0])], []
    if not finished:
        print("no run is finished")
        return
    args.docs.mkdir(parents=True, exist_ok=True)
    each_step = step_seconds([folder for folder, *_ in finished])
    for folder, target, row, seed in finished:
        mine = evaluations(folder, target, each_step=each_step, row=row, seed=seed)
        if args.kl:
            add_kl(folder, mine)
        lines += mine
    with open(args.docs / "es_vs_grpo.csv", "w", newline="") as file:
        hidden = () if args.seconds else ("seconds",)
        columns = [column for column in COLUMNS if column not in hidden]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    budgets = [budget for budget in BUDGETS if budget not in hidden]
    text = "\n\n".join(
        f"{table(lines, target, budgets)}\n\n{forgetting_at(lines, target, common_level(lines, target))}"
        for target in args.targets
        if runs_of(lines, target)
    )
    (args.docs / "es_vs_grpo.md").write_text(text + "\n")
    figure(lines, args.docs / "es_vs_grpo.png")
    print(text)


if __name__ == "__main__":
    main()
