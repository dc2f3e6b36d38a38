"""Question: which target and which σ have a signal that ES can follow, and which prior tasks are there to forget?

A step's members (noise of rank 1, as the study has it) answer the same training rows at each σ, and so does the model
itself. From the N × R rewards:

    spread           standard deviation of the members' means
    beyond rows      what of it is left for the members themselves: √(var m − MS/R), MS the mean square of the rest when
                     each member's and each row's mean are taken out (a two-way layout without replication)
    p                how often members differ as much when each row's rewards are dealt to the members at random
    equal            share of members whose mean reward another has, too (tied_members of docs/diagnostics.md)
    gain             expected gain a step (docs/diagnostics.md), which takes all of the spread for real
    real gain        α/σ · b²/√(b² + MS/k), b being what is beyond rows, where a member sees k prompts a step
    steps to 3 SE    3 · (RMS of r − r_base over members and rows)/√(held-out rows) / real gain

The rule, fixed before the first screen. A (target, σ) has signal if all hold:

    1. p ≤ 0.01;
    2. the members' mean is at most 2 spreads below the base: σ is not too wide;
    3. steps to 3 SE is at most N(σ/α)², the steps in which the free walk reaches κ = 1.

The best has the fewest steps to 3 SE. A prior counts if the base is at least 5 standard errors above chance, by text
(published grader) or by likelihood. Chance is what the most frequent answer would get, and for options at least their
mean share; other priors are listed as "nothing to forget".

Command:  python -m experiments.screen [--data=FOLDER] [--docs=docs/real_model] [--list]
          first `make smollm2`; the same command goes on where it was stopped, a candidate at a time. FOLDER has a
          folder of rows for each task, as evals.data_dir has it; without it they come from the hub.
Cost:     not yet run. seconds_step is of the wall, for the decoding of a step of the study.
Result:   not yet run.
"""

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.common import source
from es_jax.es.population import Members, Population
from es_jax.es.shaping import z_score
from es_jax.generate.engine import engine_for
from es_jax.rundir.directory import compilation_cache, write_json
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Grader
from es_jax.scoring.heldout import HeldOut, checked_prompt, evaluate
from es_jax.scoring.workers import workers_of
from es_jax.training.config import RunConfig, freeze
from es_jax.training.diagnostics import diagnose
from es_jax.training.es import Evaluator
from es_jax.training.loop import with_numbers
from es_jax.training.state import base_config, load_base, mesh_of
from es_jax.weights.model import Model
from experiments.runs import markdown, plain_errors, write_csv
from experiments.targets import CANDIDATES, Candidate

CALLS = 999  # shuffles of the test of members
PROMPT_TOKENS = 1024  # the longest prompt
VIEWS = {"accuracy": "text", "loglik": "likelihood"}
NOTHING = "nothing to forget"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a screen was made with; a candidate's file keeps it.

    Attributes:
      model: a key of `CANDIDATES`, which `configs.common.source` knows, too.
      sigmas: to try.
      ratio: α/σ; the papers' is 0.5.
      members, prompts: of a step of the study: N, and how many prompts each member sees.
      rows: of the training split, which all members answer.
      heldout: rows on which the study measures its target.
      prior_rows: of the test split, on which a prior is measured.
      data: folder of folders of rows; None: the hub.
      at_once: members in one batch; None: as the memory has room for.
      dtype: that members compute in, as model.dtype.
    """

    model: str
    sigmas: tuple[float, ...]
    ratio: float = 1.0
    members: int = 16
    prompts: int = 4
    rows: int = 24
    heldout: int = 200
    prior_rows: int = 400
    data: str | None = None
    at_once: int | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        wrong = {"members": self.members < 3, "rows": self.rows < 2, "heldout": self.heldout < 2}
        wrong |= {"sigmas": not self.sigmas or min(self.sigmas) <= 0, "ratio": self.ratio <= 0}
        for name in (name for name, bad in wrong.items() if bad):
            raise ValueError(f"{name} is {getattr(self, name)}: give at least 3 members, 2 rows, and numbers above 0")

    @property
    def steps(self) -> float:
        """N(σ/α)²."""
        return self.members / self.ratio**2


def member_rewards(
    evaluator: Evaluator, model: Model, examples: Sequence, members: Members, task: Any
) -> tuple[np.ndarray, float]:
    """[N, R] rewards of members on all examples, and the seconds that took."""
    prompts = [checked_prompt(model, type(task).__name__, example, PROMPT_TOKENS) for example in examples]
    packed = evaluator.engine.packing(prompts).pack(prompts, rows=len(prompts))
    began = time.perf_counter()
    with workers_of(task) as submit:
        grade, everyone = Grader(model, examples, submit, prompts), range(len(prompts))
        decoded = evaluator.members(model.params, members, packed)
        own = {member: (everyone, grade(everyone, tokens, length)) for member, tokens, length in decoded}
        graded = grade.shared(own).values()
    return np.array([[one.score.reward for one in ones] for ones in graded]), time.perf_counter() - began


def signal(rewards: np.ndarray, base: np.ndarray, members: Members, sigma: float, settings: Settings) -> dict[str, Any]:
    """The numbers of one (target, σ) and its verdict: rewards [N, R] of the members, [R] of the base model."""
    n, r = rewards.shape
    means, rest = rewards.mean(1), rewards - rewards.mean(1, keepdims=True) - rewards.mean(0) + rewards.mean()
    noise = float((rest**2).sum() / ((n - 1) * (r - 1)))
    between = max(float(means.var(ddof=1)) - noise / r, 0.0)
    draw = np.random.default_rng(0)
    shuffles = np.array([draw.permuted(rewards, axis=0).mean(1).var() for _ in range(CALLS)])
    spread = float(means.std())
    weights = z_score(means) if spread else np.zeros(n, np.float32)
    found = diagnose(
        Entry.of(1, members, rewards=means, weights=weights), learning_rate=settings.ratio * sigma, sigma=sigma
    )
    real = settings.ratio * between / np.sqrt(between + noise / settings.prompts) if between else 0.0
    wanted = 3 * float(np.sqrt(np.mean((rewards - base) ** 2) / settings.heldout))
    numbers = {
        "rows": r, "members": n, "base": float(base.mean()),
        "base_se": float(base.std(ddof=1) / np.sqrt(r)), "members_mean": float(means.mean()), "spread": spread,
        "beyond_rows": between**0.5, "p": float((1 + np.sum(shuffles >= means.var() - 1e-15)) / (CALLS + 1)),
        "equal": found["tied_members"], "gain": found["expected_gain"], "real_gain": real,
        "steps_to_3se": wanted / real if real else None, "steps": settings.steps,
    }  # fmt: skip
    return numbers | {"verdict": verdict(numbers)}


def verdict(numbers: Mapping[str, Any]) -> str:
    """What the rule above says: "signal", or the first thing that fails."""
    if numbers["p"] > 0.01:
        return "no: members differ by no more than rows"
    if numbers["members_mean"] < numbers["base"] - 2 * numbers["spread"]:
        return "no: σ is too wide"
    if numbers["steps_to_3se"] is None or numbers["steps_to_3se"] > numbers["steps"]:
        return "no: too small for N(σ/α)² steps"
    return "signal"


def targets(candidate: Candidate, task: Any, model: Model, config: RunConfig, settings: Settings) -> list[dict]:
    """A line for each σ. The model itself is one member more, so that all is one program."""
    examples = task.train(config.task.train_size)
    prompts = [model.encode(example.prompt) for example in examples]
    evaluator = evaluator_of(config, model, prompts, candidate.new_tokens)
    members = Population(settings.members, seed=0).members(1)
    lines, seconds = [], []
    for sigma in settings.sigmas:
        scale = np.float32(sigma / config.es.sigma)
        everyone = Members(np.append(members.seed, np.uint32(0)), np.append(members.sign * scale, np.float32(0)))
        rewards, spent = member_rewards(evaluator, model, examples, everyone, task)
        lines.append({"sigma": sigma, **signal(rewards[:-1], rewards[-1], members, sigma, settings)})
        seconds.append(spent)
    each = min(seconds) / ((settings.members + 1) * len(examples))  # the first has compiled, too
    return [line | {"seconds_step": each * settings.members * settings.prompts} for line in lines]


def evaluator_of(config: RunConfig, model: Model, prompts: Sequence[list[int]], new_tokens: int) -> Evaluator:
    """A run's own, of members that see all prompts."""
    mesh = mesh_of(config, base_config(config))
    engine = engine_for(model.config, prompts, slots=16, max_new_tokens=new_tokens, stop_token_ids=model.stop_token_ids)
    config, engine = with_numbers(config, engine, mesh, {})
    return Evaluator.of(config, engine, mesh)


def priors(candidate: Candidate, task: Any, model: Model, config: RunConfig, settings: Settings) -> list[dict]:
    """A line for each view: base score, its error, chance, and whether it counts."""
    rows = task.test(candidate.most("test", settings.prior_rows, settings.data))
    held = HeldOut.of(task, rows, model, max_prompt_tokens=PROMPT_TOKENS)
    evaluator = evaluator_of(config, model, held.prompts, candidate.new_tokens)
    ((_, results),) = evaluate(evaluator, model, model.params, [held])
    chance = max(Counter(example.answer for example in rows).values()) / len(rows)
    if held.options is not None:
        chance = max(chance, float(np.mean([1 / len(options) for _, options, _ in held.options])))
    views = {"accuracy": results.right, "loglik": results.loglik}
    return [prior(view, right, chance) for view, right in views.items() if right is not None]


def prior(view: str, right: np.ndarray, chance: float) -> dict[str, Any]:
    """The line of one view; an error of 0, of a score of 0 or 1, counts as one row's."""
    score, n = float(np.mean(right)), len(right)
    error = float(np.sqrt(score * (1 - score) / n))
    above = (score - chance) / (error or 1 / n)
    numbers = {"view": VIEWS[view], "rows": n, "base": score, "base_se": error, "chance": chance}
    return numbers | {"errors_above": above, "verdict": "counts" if above >= 5 else NOTHING}


def screen(name: str, candidate: Candidate, settings: Settings) -> dict[str, Any]:
    """All lines of a candidate."""
    task, found = candidate.make(settings.data), {"settings": dataclasses.asdict(settings), "targets": [], "priors": []}
    size = candidate.most("train", settings.rows, settings.data) if candidate.use != "prior" else settings.rows
    config = freeze({
        "model": {"source": source(settings.model), "dtype": settings.dtype},
        "task": {**candidate.fields(settings.data), "train_size": size},
        "es": {"noise": "low_rank", "population": settings.members + 1, "sigma": max(settings.sigmas)},
        "decode": {"max_prompt_tokens": PROMPT_TOKENS, "max_new_tokens": candidate.new_tokens, "slots": 16,
                   "members_at_once": settings.at_once},
    })  # fmt: skip
    model = load_base(config, mesh_of(config, base_config(config)))
    if candidate.use != "prior":
        found["targets"] = [{"target": name, **x} for x in targets(candidate, task, model, config, settings)]
    if candidate.use != "target":
        found["priors"] = [{"prior": name, **x} for x in priors(candidate, task, model, config, settings)]
    return found


def write(lines: dict[str, list[dict]], docs: Path, command: str) -> None:
    """screen.csv, screen_priors.csv, and both as screen.md."""
    docs.mkdir(parents=True, exist_ok=True)
    text = []
    for kind, stem in (("targets", "screen"), ("priors", "screen_priors")):
        if rows := lines[kind]:
            write_csv(docs / f"{stem}.csv", [row | {"command": command} for row in rows])
            text.append(markdown(list(rows[0]), [list(map(shown, row.values())) for row in rows]))
    fitting = [row for row in lines["targets"] if row["verdict"] == "signal"]
    best = min(fitting, key=lambda row: row["steps_to_3se"], default=None)
    text.append(f"Best: {best['target']} at σ = {best['sigma']:g}." if best else "No target has signal.")
    (docs / "screen.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


def shown(value: Any) -> str:
    """A cell of the report."""
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def read(path: Path, settings: Settings) -> dict[str, Any] | None:
    """A candidate's file, None where there is none. ValueError for one of other settings."""
    if not path.exists():
        return None
    found, wanted = json.loads(path.read_text()), json.loads(json.dumps(dataclasses.asdict(settings)))
    before = found["settings"]
    if differing := [f"{name} = {before[name]!r}" for name in wanted if before[name] != wanted[name]]:
        raise ValueError(f"{path} was made with {', '.join(differing)}: use that, or another --out")
    return found


def command_of(args: argparse.Namespace) -> str:
    """What makes the same lines again."""
    words = ["python -m experiments.screen", f"--model={args.model}"]
    words += [f"--sigmas {' '.join(f'{sigma:g}' for sigma in args.sigmas)}"]
    words += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in NUMBERS]
    words += [f"--dtype={args.dtype}"] * (args.dtype != "auto")
    words += [f"--candidates {' '.join(args.candidates)}", *([f"--data={args.data}"] if args.data else [])]
    return " ".join(words)


NUMBERS = ("ratio", "members", "prompts", "rows", "heldout", "prior_rows")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CANDIDATES), default="smollm2")
    parser.add_argument("--candidates", nargs="+", help="names of experiments.targets.CANDIDATES; all by default")
    parser.add_argument("--sigmas", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    for field in dataclasses.fields(Settings):
        if field.name in NUMBERS:
            kind: Any = type(field.default)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--at-once", type=int, help="members in one batch; as the memory has room for by default")
    parser.add_argument("--dtype", default="auto", help="model.dtype: bfloat16 where the cores have it")
    parser.add_argument("--data", help="a folder with a folder of rows for each task; the hub by default")
    parser.add_argument("--out", type=Path, default=Path("runs/screen"), help="a file for each finished candidate")
    parser.add_argument("--docs", type=Path, help="where the report goes; the out folder by default")
    parser.add_argument("--list", action="store_true", help="print the candidates and run nothing")
    parser.add_argument("--only-report", action="store_true", help="run nothing; report what is finished")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def main() -> None:
    args = parser().parse_args()
    with plain_errors(traceback=args.traceback):
        known = CANDIDATES[args.model]
        args.candidates = args.candidates or list(known)
        if wrong := [name for name in args.candidates if name not in known]:
            raise ValueError(f"--candidates has {wrong[0]!r}: the model {args.model} has {', '.join(known)}")
        numbers = {name: getattr(args, name) for name in NUMBERS}
        settings = Settings(
            args.model, tuple(args.sigmas), data=args.data, at_once=args.at_once, dtype=args.dtype, **numbers
        )
        paths = {name: args.out / args.model / f"{name}.json" for name in args.candidates}
        found = {name: read(path, settings) for name, path in paths.items()}
        if args.list:
            print("\n".join(f"{'done' if found[name] else 'open'} {name} ({known[name].use})" for name in paths))
            return
        for name, path in paths.items():
            if found[name] is None and not args.only_report:
                with compilation_cache(args.out / "cache"):
                    found[name] = screen(name, known[name], settings)
                write_json(path, found[name])
        finished = [lines for lines in found.values() if lines is not None]
        lines = {kind: [line for one in finished for line in one[kind]] for kind in ("targets", "priors")}
        write(lines, args.docs or args.out, command_of(args))


if __name__ == "__main__":
    main()
