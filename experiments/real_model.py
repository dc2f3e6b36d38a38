"""Question: on a real language model, does the random walk of ES forget, does AWD keep, do more members do so, too?

SmolLM2-135M-Instruct on a target that experiments/screen.py found to have signal. Runs: ES (N members that all see the
k prompts of a step, noise of rank 1); ES + AWD l2 at κ = 1 and 0.5; random rewards; 4 N members, each with k/4 of the
prompts; GRPO with N rollouts of k prompts. All make N·k completions a step. And a pair of short runs that differ in
the noise alone, rank 1 and full rank. The first three have all seeds, the others the first.

All have 75 steps but the short pair, which has 25; both numbers were fixed before the first run. A free walk reaches
κ = 1 after N(σ/α)² steps, and fewer are refused. Every 25 steps: reward and accuracy of the target on held-out rows;
the priors that the screen passed, by all views; perplexity of a text of our own; exact KL; drift beside its closed
form. Changes are against step 0 on the same rows, with paired standard errors.

The rule: if the mean change of ES's target reward at its last step is below 3 of its paired standard errors, the report
says "no signal" and draws no conclusion about forgetting.

Command:  python -m experiments.real_model --size=full --docs=docs/real_model [--list] [--index=$I] [--data=FOLDER]
          first `make smollm2` and python -m experiments.screen [--data=FOLDER] --docs=docs/real_model
          The same command goes on where it was stopped. --size=lab is the same at laboratory size, in minutes.
Cost:     --list has it for each run, measured or by the screen.
Result:   not yet run.
"""

import argparse
import csv
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.lines import Line2D

from configs.common import configure
from es_jax.evals.load_step import load_step
from es_jax.evals.runner import Options, evaluate_run
from es_jax.plotting import figures
from es_jax.rundir.checkpoints import saved_steps
from es_jax.rundir.directory import write_json
from es_jax.rundir.metrics import Jsonl, read_jsonl
from es_jax.scoring.row_results import read_evals
from es_jax.scoring.text import perplexity
from es_jax.tasks.outside import label
from es_jax.training.config import read_config
from experiments.runs import Case, arguments, chosen, done, execute, markdown, mean_se, page, plain_errors, report
from experiments.targets import CANDIDATES

EVERY = 25  # steps between evaluations
STEPS = 75  # of SmolLM2: the free walk of N = 16 and σ = α goes to κ = √(75/16) = 2.2, that of 64 to 1.1
TRAIN_ROWS, TARGET_ROWS, PROMPT_TOKENS = 480, 200, 1024
KL = {"kl_rows": 64, "kl_tokens": 64}  # of the target's held-out prompts
VIEWS = ("accuracy", "strict", "robust", "loglik")
VIEW_OF = {"text": "accuracy", "likelihood": "loglik"}  # what the screen calls it → its column
MEASURED = "measured.json"
TEXT = """\
The harbour of the small town lies between two low hills. In the morning the boats come back, and the people who wait
on the quay can tell from the sound of the engines whose boat it is. Fish is sold from the deck before it reaches the
market. By ten o'clock the nets hang over the wall to dry, and the cats have gone to sleep in the shade of the church.

A machine that adds numbers needs three parts: a place where the numbers are kept, a part that combines two of them,
and a part that decides which two come next. The first machines had wheels with ten teeth for the first part. Later
ones had valves, and the machines of today have millions of switches that are too small to be seen, but the three
parts are there.

When water is heated it takes up energy, and its molecules move faster. At a hundred degrees some of them are fast
enough to leave the others for good. We call this boiling. On a high mountain the air presses less on the water, and it
boils sooner; that is why an egg takes longer to cook there, although the pot looks as lively as it does at the coast.
"""


@dataclasses.dataclass(frozen=True)
class Study:
    """The setting of all runs.

    Attributes:
      model: a key of `CANDIDATES`.
      target, priors: names of its candidates; of a prior also the view that counts, "text" or "likelihood".
      members, prompts: N, and k prompts a step.
      sigma, ratio: σ and α/σ.
      pair: N and k of the two runs that differ in the noise; their σ and α are the others'.
      grpo_rate: the learning rate of GRPO.
      steps: of the runs but the pair; None: the fewest.
      prior_rows: test rows of each prior, where there are so many.
      data, dtype: as of `experiments.screen.Settings`.
    """

    model: str
    target: str
    priors: Mapping[str, str]
    members: int = 16
    prompts: int = 4
    sigma: float = 2e-3
    ratio: float = 1.0
    pair: tuple[int, int] = (8, 16)
    grpo_rate: float = 1e-5
    steps: int | None = None
    prior_rows: int = 400
    every: int = EVERY
    data: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        known = CANDIDATES[self.model]
        for name in (self.target, *self.priors):
            if name not in known:
                raise ValueError(f"{name!r} is no candidate of {self.model}: choose of {', '.join(known)}")
        if wrong := [name for name, view in self.priors.items() if view not in VIEW_OF]:
            raise ValueError(f"prior {wrong[0]} has the view {self.priors[wrong[0]]!r}: it must be text or likelihood")
        if self.target in self.priors:
            raise ValueError(f"{self.target} is the target and a prior: leave it out of --priors")
        if self.prompts % 4:
            raise ValueError(f"prompts is {self.prompts}: it must be a multiple of 4, a quarter of them has a run")
        if self.steps is not None and self.steps < (least := self.fewest(self.members)):
            raise ValueError(
                f"steps is {self.steps}: the walk to κ = 1 takes {least}, N(σ/α)² in steps of {self.every}"
            )

    def fewest(self, members: int) -> int:
        """The first multiple of `every` from N(σ/α)² on."""
        return self.every * math.ceil(members / self.ratio**2 / self.every)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # its name in tables, and what differs from ES
    "es": ("ES", {}),
    "awd-1": ("ES + AWD l2, κ = 1", {"optim__anchor__penalty": "l2", "optim__anchor__kappa": 1.0}),
    "awd-0.5": ("ES + AWD l2, κ = 0.5", {"optim__anchor__penalty": "l2", "optim__anchor__kappa": 0.5}),
    "random": ("ES, random rewards", {"es__rewards": "random"}),
    "members": ("ES, 4 N members, k / 4 prompts each", {}),
    "grpo": ("GRPO", {}),
    "pair-rank-1": ("ES, short, rank 1", {}),
    "pair-full-rank": ("ES, short, full rank", {"es__noise": "gaussian"}),
}
SEEDED = 3  # of these have all seeds, the others the first


def cases(study: Study, seeds: Sequence[int]) -> Iterator[Case]:
    """Every run, those of the first seed first."""
    names = list(RUNS)
    wanted = [(name, seed) for seed in seeds for name in names[:SEEDED]]
    for name, seed in wanted + [(name, seeds[0]) for name in names[SEEDED:]]:
        config = config_of(study, name)
        config.train.seed = seed
        yield Case.of(config, run=name, target=study.target, model=study.model, seed=seed)


def config_of(study: Study, name: str) -> Any:
    """The config of a run, as a config file would give it."""
    target, short = CANDIDATES[study.model][study.target], name.startswith("pair")
    members, prompts = study.pair if short else (study.members, study.prompts)
    steps = study.fewest(members) if short else study.steps or study.fewest(members)
    fields: dict[str, Any] = {
        **{f"task__{field}": value for field, value in target.fields(study.data).items()},
        "task__train_size": target.most("train", TRAIN_ROWS, study.data),
        "task__prompts_per_step": prompts,
        "decode__max_prompt_tokens": PROMPT_TOKENS,
        "decode__max_new_tokens": target.new_tokens,
        "train__steps": steps,
        "train__checkpoint_every": study.every,
        "train__keep_checkpoints": steps // study.every,
        "evals__every": study.every,
        "evals__rows": target.most("test", TARGET_ROWS, study.data),
        "model__dtype": study.dtype,
    }
    if name == "grpo":
        own = {"grpo__rollouts": members, "grpo__mini_batch": prompts, "optim__learning_rate": study.grpo_rate}
        return configure("grpo", model=study.model, grpo=own, **fields)
    fields |= {"es__population": members, "es__sigma": study.sigma, "es__noise": "low_rank"}
    fields["optim__learning_rate"] = study.ratio * study.sigma
    if name == "members":
        fields |= {"es__population": 4 * members, "es__prompts_per_member": prompts // 4}
    return configure("", model=study.model, **fields | RUNS[name][1])


def measure(folder: Path, study: Study, steps: Sequence[int], *, others: Sequence[Path] = ()) -> None:
    """What training does not measure, at these steps of a finished run; then checkpoints that a replay can make again
    are deleted. What is done is not done again; the base model's priors are those of `others`, where one has them."""
    began, candidates = time.perf_counter(), CANDIDATES[study.model]
    evaluate_run(folder, steps=steps, kl=True, drift=True, options=Options(**KL))
    for name in study.priors:
        prior = candidates[name]
        share_base(folder, others, label(prior.task))
        size = prior.most("test", study.prior_rows, study.data)
        limits = Options(rows=size, max_prompt_tokens=PROMPT_TOKENS, max_new_tokens=prior.new_tokens, slots=16)
        evaluate_run(folder, tasks=[prior.make(study.data)], steps=steps, options=limits)
    file = Jsonl(folder / "perplexity.jsonl")
    for step in (step for step in steps if step not in file.steps):
        file.write({"step": step, "perplexity": perplexity(load_step(folder, step), text_of(study.model))})
    write_json(folder / MEASURED, {"seconds": time.perf_counter() - began, "priors": list(study.priors)})
    for step in saved_steps(folder)[:-1] if read_config(folder).record.replayable else ():
        shutil.rmtree(folder / "ckpt" / str(step))


def share_base(folder: Path, others: Sequence[Path], task: str) -> None:
    """Copy the evaluation of the base model on a task from the first of the other runs that has it."""
    for part in (f"{task}.jsonl", f"verdicts/{task}.jsonl"):  # a verdict is written before its row
        found = [other / "evals" / part for other in others if (other / "evals" / part).exists()]
        if found and not (new := folder / "evals" / part).exists():
            base = [line for line in found[0].read_text().splitlines(keepends=True) if json.loads(line)["step"] == 0]
            new.write_text("".join(base))


def text_of(model: str) -> str:
    """The fixed text: English, or for the laboratory, which has no words, its own lines."""
    return TEXT if model != "lab" else "A37+48=85"


def steps_of(case: Case) -> list[int]:
    """Those at which a run is evaluated."""
    return [*range(0, case.config.train.steps, case.config.evals.every), case.config.train.steps]


def is_measured(folder: Path, study: Study) -> bool:
    """Whether all of the study's priors were measured."""
    path = folder / MEASURED
    return path.exists() and set(study.priors) <= set(json.loads(path.read_text())["priors"])


def lines_of(
    labels: Mapping[str, Any], folder: Path, study: Study, steps: Sequence[int], command: str
) -> list[dict[str, Any]]:
    """A line for each of these evaluations of a measured run."""
    config, evals = read_config(folder), folder / "evals"
    by_step = lambda name: {row["step"]: row for row in read_evals(evals / f"{name}.jsonl")}  # noqa: E731
    target, drift, kl = by_step(label(config.task.name)), by_step("drift"), by_step("kl")
    priors = {name: by_step(label(CANDIDATES[study.model][name].task)) for name in study.priors}
    text = {row["step"]: row["perplexity"] for row in read_jsonl(folder / "perplexity.jsonl")}
    seconds = [row["seconds"] for row in read_jsonl(folder / "metrics.jsonl")]
    es = config.method == "es"
    facts = {
        "steps": config.train.steps,
        "N": config.es.population if es else config.grpo.rollouts,
        "prompts": config.task.prompts_per_step,
        "prompts_per_member": (es and config.es.prompts_per_member) or config.task.prompts_per_step,
        "sigma": config.es.sigma if es else None,
        "alpha": config.optim.learning_rate,
    }
    lines = []
    for step in steps:
        line = {**labels, **facts, "step": step, "rows": target[step]["n"]}
        line |= columns(target[step], "reward", "") | columns(target[step], "accuracy", "")
        line |= mean_of([columns(rows[step], VIEW_OF[study.priors[name]], "") for name, rows in priors.items()])
        for name, rows in priors.items():
            line |= {f"{name}_rows": rows[step]["n"]}
            for view in VIEWS:
                line |= columns(rows[step], view, f"{name}_")
        walk, now = drift.get(step, {}), kl.get(step, {})
        line |= {"perplexity": text[step], "kl": now.get("kl_exact_token"), "kl_se": now.get("kl_exact_token_se")}
        line |= {"drift": walk.get("norm", 0.0), "closed_form": walk.get("predicted"), "ratio": walk.get("ratio")}
        line |= {"kappa": walk.get("kappa"), "seconds_step": float(np.median(seconds))}
        lines.append(line | {"hours": sum(seconds) / 3600, "command": command})
    return lines


def columns(row: Mapping[str, Any], name: str, prefix: str) -> dict[str, Any]:
    """A score of a row of evals/<task>.jsonl, its change since step 0, and their errors."""
    return {f"{prefix}{name}{end}": row.get(f"{name}{end}") for end in ("", "_se", "_change", "_change_se")}


def mean_of(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over priors of the view that counts; their rows are independent, and so are their errors."""
    values: list[list[float | None]] = [list(column) for column in zip(*(one.values() for one in scores), strict=True)]
    if not values:
        return {"prior": None, "prior_change": None, "prior_change_se": None}
    score, _, change, error = values
    root = None if None in error else math.hypot(*error) / len(scores)  # type: ignore[arg-type]
    mean = lambda own: None if None in own else float(np.mean(own))  # noqa: E731
    return {"prior": mean(score), "prior_change": mean(change), "prior_change_se": root}


def last_lines(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The last evaluation of every seed of each run."""
    last = {(line["run"], line["seed"]): line for line in lines}
    return {name: [line for (run, _), line in last.items() if run == name] for name in RUNS}


def change(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """The mean change of a score over seeds, and its paired error over the held-out rows: that of one seed, for all
    have the same rows, which may be hard or easy for all."""
    errors = [row[f"{name}_change_se"] for row in rows]
    return float(np.mean([row[f"{name}_change"] for row in rows])), math.hypot(*errors) / math.sqrt(len(rows))


def verdict(lines: Sequence[Mapping[str, Any]]) -> str:
    """The rule of the docstring, said of these runs."""
    rows = last_lines(lines)["es"]
    if not rows:
        return "No run of ES is finished: no conclusion."
    mean, error = change(rows, "reward")
    text = f"the target reward of ES changed by {mean:+.3f} ± {error:.3f} on {rows[0]['rows']} held-out rows"
    if mean < 3 * error or error == 0:
        return f"No signal: {text}, below 3 paired errors. No conclusion about forgetting is drawn."
    return f"Signal: {text}, {mean / error:.1f} paired errors."


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the verdict, the base model, and the last evaluation of every run; ± are paired errors over rows."""
    head = ["run", "seeds", "N × k", "steps", "target reward", "change", "mean prior", "change", "perplexity", "KL",
            "drift", "drift / closed form", "κ", "seconds a step"]  # fmt: skip
    base = lines[0]
    prior = "–" if base["prior"] is None else f"{base['prior']:.3f}"
    body = [
        ["base", "", "", "0", f"{base['reward']:.3f}", "", prior, "", f"{base['perplexity']:.2f}", "0", "0", *[""] * 3]
    ]
    for name, rows in last_lines(lines).items():
        if rows:
            one = rows[0]
            cells = [RUNS[name][0], str(len(rows)), f"{one['N']} × {one['prompts_per_member']}", str(one["steps"])]
            for score in ("reward", "prior"):
                known = one[f"{score}_change_se"] is not None
                cells += [
                    mean_se(row[score] for row in rows),
                    "{:+.3f} ± {:.3f}".format(*change(rows, score)) if known else "–",
                ]
            for column, digits in (
                ("perplexity", 2),
                ("kl", 4),
                ("drift", 2),
                ("ratio", 3),
                ("kappa", 2),
                ("seconds_step", 1),
            ):
                cells.append(mean_se((row[column] for row in rows), digits))
            body.append(cells)
    return f"{verdict(lines)}\n\n{markdown(head, body)}"


def figure(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Target reward against the mean prior, means over seeds, a line a run, its points coloured by iteration."""
    drawing = figures.canvas(7.5, 5.2)
    axes, samples, last = drawing.subplots(), [], max(line["step"] for line in lines)
    for number, (name, (title, _)) in enumerate(RUNS.items()):
        own = [line for line in lines if line["run"] == name and line["prior"] is not None]
        steps = list(dict.fromkeys(line["step"] for line in own))
        x, y = (
            [np.mean([line[c] for line in own if line["step"] == step]) for step in steps] for c in ("reward", "prior")
        )
        style = figures.line(number)
        path_style = {"color": "0.6", "linewidth": 1, "linestyle": style["linestyle"]}
        axes.plot(x, y, zorder=1, **path_style)
        points = axes.scatter(
            x, y, c=steps, cmap="viridis", vmin=0, vmax=last, s=34, marker=style["marker"], edgecolors="black",
            linewidths=0.6, zorder=2,
        )  # fmt: skip
        mark = {"marker": style["marker"], "markerfacecolor": "white", "markeredgecolor": "black"}
        samples += [Line2D([], [], label=title, **path_style, **mark)] * bool(own)
    axes.set(xlabel=f"reward on held-out rows of {lines[0]['target']}", ylabel="mean score on the prior tasks")
    axes.grid(alpha=0.3)
    drawing.legend(handles=samples, fontsize=7, ncols=2, loc="outside lower center")
    drawing.colorbar(points, ax=axes, label="iteration")
    drawing.savefig(path)


def state(case: Case, folder: Path, study: Study, each: float | None) -> str:
    """How far a run is, and what it costs: measured, or by the screen's seconds of a step's decoding."""
    steps, rows = case.config.train.steps, read_jsonl(folder / "metrics.jsonl")
    seconds = [row["seconds"] for row in rows]
    pace = float(np.median(seconds)) if seconds else each
    if is_measured(folder, study):
        spent = json.loads((folder / MEASURED).read_text())["seconds"]
        return f"done: {sum(seconds) / 60:.1f} min of steps, {spent / 60:.1f} min of measuring"
    left = (
        "not known: run the screen"
        if pace is None
        else f"about {pace * (steps - len(rows)) / 60:.0f} min of steps left"
    )
    return f"{'trained' if done(folder) else f'step {len(rows)} of {steps}'}: {left}"


def screen_lines(folder: Path, stem: str) -> list[dict[str, str]]:
    """The lines of a CSV of the screen. Raises FileNotFoundError, with the command, where there is none."""
    path = folder / f"{stem}.csv"
    if not path.exists():
        command = f"python -m experiments.screen --docs={folder}"
        raise FileNotFoundError(f"{path} is not there: run {command}, or give --target, --sigma and --priors")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def study_of(args: argparse.Namespace) -> Study:
    """The study of the command line; what it leaves out is what the screen found."""
    fields = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    if args.priors is not None:
        fields["priors"] = dict(name.split(":") if ":" in name else (name, "text") for name in args.priors)
    if args.size == "lab":
        return Study(**LAB | fields)
    if not {"target", "sigma"} <= fields.keys():
        signals = [row for row in screen_lines(args.screen, "screen") if row["verdict"] == "signal"]
        own = [row for row in signals if fields.get("target", row["target"]) == row["target"]]
        if not own:
            raise ValueError(f"the screen in {args.screen} found no signal: a study would show nothing; give --target")
        best = min(own, key=lambda row: float(row["steps_to_3se"]))
        fields = {"target": best["target"], "sigma": float(best["sigma"])} | fields
    if "priors" not in fields:
        rows = [row for row in screen_lines(args.screen, "screen_priors") if row["verdict"] == "counts"]
        fields["priors"] = {row["prior"]: row["view"] for row in rows if row["prior"] != fields["target"]}
    return Study(model="smollm2", **{"steps": STEPS} | fields)


OPTIONS = ("target", "sigma", "ratio", "members", "prompts", "steps", "prior_rows", "grpo_rate", "data", "dtype")
LAB: dict[str, Any] = {
    "model": "lab", "target": "lab-countdown", "priors": {"lab-add": "text", "lab-compare": "text"},
    "members": 8, "prompts": 64, "sigma": 0.01, "ratio": 0.5, "pair": (4, 64), "grpo_rate": 1e-4, "prior_rows": 100,
}  # fmt: skip


def command_of(study: Study, seeds: Sequence[int], index: int) -> str:
    """What makes one run, and its lines, again."""
    size = "lab" if study.model == "lab" else "full"
    words = [f"python -m experiments.real_model --size={size} --seeds {' '.join(map(str, seeds))} --index={index}"]
    words += [f"--{name.replace('_', '-')}={x}" for name in OPTIONS if (x := getattr(study, name)) is not None]
    return " ".join([*words, "--priors", *(f"{name}:{view}" for name, view in study.priors.items())])


def parser() -> argparse.ArgumentParser:
    parser, known = arguments(__doc__, "real_model"), {field.name: field for field in dataclasses.fields(Study)}
    for name in OPTIONS:
        kind: Any = {"steps": int, "target": str, "data": str}.get(name) or type(known[name].default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument(
        "--priors", nargs="*", help="NAME:VIEW, view text or likelihood; by default what passed the screen"
    )
    parser.add_argument("--json", nargs="+", type=Path, help="measure these finished runs, and print one JSON of them")
    parser.add_argument("--screen", type=Path, default=Path("docs/real_model"), help="the folder of the screen's CSVs")
    return parser


def main() -> None:
    args = parser().parse_args()
    with plain_errors(traceback=args.traceback):
        study = study_of(args)
        if args.json:
            print(json.dumps(results(args.json, study)))
        else:
            run(study, args)


def results(folders: Sequence[Path], study: Study) -> dict[str, Any]:
    """Base and last step of the runs of launch/one_gpu.sh, measured here; folders have the names of RUNS."""
    lines = []
    for folder in folders:
        steps = [0, read_config(folder).train.steps]
        measure(folder, study, steps, others=folders)
        labels = {"run": folder.name, "target": study.target, "model": study.model, "seed": 0}
        lines += lines_of(labels, folder, study, steps, "launch/one_gpu.sh")
    return {"device": jax.devices()[0].device_kind, "verdict": verdict(lines), "lines": lines}


def run(study: Study, args: argparse.Namespace) -> None:
    """List, or run what is left, and report what is measured."""
    grid = list(cases(study, args.seeds))
    folders = [case.folder(args.out) for case in grid]
    if args.list:
        for i, (case, folder) in enumerate(zip(grid, folders, strict=True)):
            print(f"{i} {folder}: {state(case, folder, study, pace_of(study, args.screen, case))}")
        return
    if not args.only_report:
        for case in chosen(grid, args.index):
            execute([case], args.out)
            if not is_measured(case.folder(args.out), study):
                measure(case.folder(args.out), study, steps_of(case), others=folders)
    finished = [i for i, folder in enumerate(folders) if done(folder) and is_measured(folder, study)]
    lines = []
    for i in finished:
        how, case = command_of(study, args.seeds, i), grid[i]
        lines += lines_of(case.labels, folders[i], study, steps_of(case), how)
    if lines:
        report(lines, args.docs or args.out, "real_model", labels=(), figure=figure, text=table(lines))
        page([folders[i] for i in finished], args.out / "report")
    else:
        print("no run is measured")


def pace_of(study: Study, folder: Path, case: Case) -> float | None:
    """Seconds of the decoding of a step by the screen, where it has the target and σ."""
    if not (folder / "screen.csv").exists():
        return None
    own = [
        x for x in screen_lines(folder, "screen") if x["target"] == study.target and float(x["sigma"]) == study.sigma
    ]
    members, prompts = study.pair if case.labels["run"].startswith("pair") else (study.members, study.prompts)
    each = [float(x["seconds_step"]) / (int(x["members"]) * study.prompts) for x in own]
    return each[0] * members * prompts if each else None


if __name__ == "__main__":
    main()
