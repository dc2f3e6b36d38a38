"""Low-rank noise, whose members share weights, against full rank and against torch on the same rollouts.

Command:  python -m benchmarks.low_rank --part=iteration --data=DIR [--members=64] [--k=1] [--dtype=float32] [--torch]
          python -m benchmarks.low_rank --part=lab | memory | update
          --repeats=2 --rank=1 --json[=FILE]
Needs:    `make smollm2`; --data: a folder of GSM8K rows; --torch: EXTRAS=verify.
Cost:     an iteration with 64 members takes half a minute with low rank and three minutes with full rank on 2 CPU
          cores.
Result:   docs/speed.md

iteration: noise, decoding, grading and update on SmolLM2-135M, with P = 8 GSM8K prompts, of which each member sees k,
and 64 new tokens; no row ends early. Full rank is tried with each number of --together on 16 members, and the fastest
is timed; 16 at once need more than 24 GiB. With --full-members=16 it is timed on that many members, and the time is
scaled to all, since its members are evaluated and added one after another. lab: steps of the laboratory model, N = 512,
k = 1, P = 64. memory: the memory of the compiled programs beyond weights and caches. update: N = 1024 on the shape of
SmolLM2.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import add_json, in_turn, report, write_json
from benchmarks.iteration import SMOLLM2, EndedEngine
from benchmarks.noise import smollm2
from configs import lab
from es_jax.core.mesh import make_mesh
from es_jax.core.tree import count, named_leaves
from es_jax.es.population import Population
from es_jax.es.shaping import z_score
from es_jax.models.sharding import param_shardings
from es_jax.plotting import read_run
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Grader
from es_jax.scoring.workers import at_once
from es_jax.tasks import get_task
from es_jax.training import state as states
from es_jax.training.config import RunConfig, freeze
from es_jax.training.es import Evaluator, Evolution
from es_jax.training.loop import run
from es_jax.training.sizes import members_at_once
from es_jax.training.state import State
from es_jax.weights.model import load_model, save_model
from es_jax.weights.tokenizer import encode_prompt

PROMPTS, NEW, SIGMA, RATE, STRENGTH, TRIED = 8, 64, 1e-3, 5e-4, 10.0, 16
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """The common work of all sides of an iteration."""

    args: argparse.Namespace

    def __post_init__(self):
        task, model = get_task("gsm8k", data_dir=self.args.data), load_model(SMOLLM2)
        examples = task.train(PROMPTS)
        prompts = [encode_prompt(model.tokenizer, example.prompt) for example in examples]
        for name, value in {"model": model, "task": task, "examples": examples, "prompts": prompts}.items():
            object.__setattr__(self, name, value)

    def grader(self) -> Grader:
        """A grader for one iteration, since a grader does not grade a completion twice."""
        return Grader(self.model, self.examples, at_once(self.task), self.prompts)

    def config(self, noise: str, population: int, **decode: Any) -> RunConfig:
        es = {"population": population, "sigma": SIGMA, "noise": noise, "prompts_per_member": self.args.k}
        es |= {"rank": self.args.rank} if noise == "low_rank" else {}
        optim = {"learning_rate": RATE, "anchor": {"penalty": "l2", "strength": STRENGTH}}
        sections = {"es": es, "optim": optim, "decode": decode, "evals": {"every": 0}}
        return freeze({"model": {"dtype": self.args.dtype}, "task": {"prompts_per_step": PROMPTS}, **sections})

    def ours(self, noise: str, together: int | None) -> Callable[[int], float]:
        """Run an iteration with so many members; returns its seconds."""
        mesh, made, turns = make_mesh(1, 1), {}, [0]
        sizes = {"slots": self.args.k, "max_new_tokens": NEW, "max_prompt_tokens": max(map(len, self.prompts))}
        engine = EndedEngine(
            self.model.config, stop_token_ids=self.model.stop_token_ids, lengths=(NEW,) * self.args.k, **sizes
        )

        def call(members: int) -> float:
            config = self.config(noise, members)
            number = together or members_at_once(config, engine, mesh)
            config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, members_at_once=number))
            if not made:
                params = jax.tree.map(jnp.copy, self.model.params)
                made["state"] = State(config, mesh, jax.device_put(params, param_shardings(mesh, params)))
            evaluator = Evaluator.of(config, engine, mesh)
            method = Evolution(config, evaluator, made["state"], engine.packing(self.prompts))
            turns[0] += 1
            grader = self.grader()
            began = time.perf_counter()
            _, graded, _ = method.step(turns[0], self.prompts, grader, lambda done: None)
            float(made["state"].drift)
            took = time.perf_counter() - began
            lengths = [one.length for ones in graded for one in ones]
            assert lengths == [NEW] * (members * self.args.k)
            return took

        return call

    def peer(self, folder: Path) -> Callable[[int], float]:
        """The same with torch and transformers, member by member."""
        import torch
        from transformers import AutoModelForCausalLM

        from benchmarks import peer_torch

        net = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.args.dtype)).eval()
        anchor = [param.detach().clone() for param in net.parameters()]
        turns = [0]

        def call(members: int) -> float:
            turns[0] += 1
            grader = self.grader()
            dealt = Population(members, seed=0).deal(turns[0], PROMPTS, self.args.k).tolist()
            lengths = [NEW] * self.args.k

            def score(member: int, tokens: np.ndarray) -> float:
                assert tokens.shape == (self.args.k, NEW)
                graded = grader(dealt[member], tokens, np.array(lengths))
                return float(np.mean([one().score.reward for one in graded]))

            prompts = [[self.prompts[i] for i in own] for own in dealt]
            began = time.perf_counter()
            peer_torch.iteration(
                net, anchor, prompts, [lengths] * members, score,
                step=turns[0], sigma=SIGMA, rate=RATE, decay=RATE * STRENGTH, stop=self.model.stop_token_ids[0],
            )  # fmt: skip
            return time.perf_counter() - began

        return call


def iteration(args: argparse.Namespace) -> None:
    work, tried = Work(args), {}
    sides = {"low rank": work.ours("low_rank", None)}
    for together in args.together if len(args.together) > 1 else ():
        side = work.ours("gaussian", together)
        side(TRIED)
        tried[together] = side(TRIED)
        say(f"full rank, {together} at once: {tried[together] / TRIED:.2f} s a member")
    best = min(tried, key=tried.__getitem__) if tried else args.together[0]
    sides[f"full rank, {best} at once"] = work.ours("gaussian", best)
    with tempfile.TemporaryDirectory() as folder:
        if args.torch:
            save_model(folder, work.model)
            sides["torch"] = work.peer(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.repeats + 1):
            for name, side in sides.items():
                full = name.startswith("full") and (args.full_members or args.members)
                members = full or args.members
                took = side(members if turn or not full else TRIED) * (args.members / members if turn else 1)
                say(f"{name}, {f'turn {turn}' if turn else 'warm-up'}: {took:.1f} s")
                if turn:
                    seconds[name].append(took)
    title = f"iteration, N = {args.members}, k = {args.k}, P = {PROMPTS}, {NEW} new tokens, {args.dtype}"
    more = {"full rank timed on": args.full_members or args.members, "rank": args.rank}
    more |= {"seconds a member, tried": {n: t / TRIED for n, t in tried.items()}}
    report(title, seconds, ours="low rank", json_to=args.json, **more)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lab_steps(args: argparse.Namespace) -> None:
    """The median step time of each side, over runs in turn."""
    sides = {"low rank": f"noise=low_rank,rank={args.rank}"} | {f"full rank, {n} at once": "" for n in (1, 4, 16)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.repeats):
        for name, argument in sides.items():
            config = lab.get_config(f"population=512,prompts_per_member=1,steps=30,seed={turn},{argument}".rstrip(","))
            config.evals.every = 0
            if not argument:
                config.decode.members_at_once = int(name.split()[2])
            with tempfile.TemporaryDirectory() as folder:
                run(config, folder)
                steps = [row["seconds"] for row in read_run(folder).metrics]
            seconds[name].append(statistics.median(steps[5:]))
    report("a step of the laboratory model, N = 512, k = 1, P = 64", seconds, ours="low rank", json_to=args.json)


def memory(args: argparse.Namespace) -> None:
    """The memory of the compiled programs beyond θ, the anchor, the one copy of θ and the caches, according to the
    compiler."""
    config, params = smollm2(args.layers)
    fields = {"model": {"dtype": args.dtype}, "decode": {"members_at_once": args.members}}
    run_config = freeze({"es": {"noise": "low_rank", "rank": args.rank, "population": args.members}, **fields})
    engine = EndedEngine(config, slots=1, max_prompt_tokens=args.prompt, max_new_tokens=NEW, stop_token_ids=(0,))
    engine = dataclasses.replace(engine, lengths=(NEW,))
    evaluator, mesh = Evaluator.of(run_config, engine, make_mesh(1, 1)), make_mesh(1, 1)
    members = Population(args.members, seed=0).members(1)
    shared, pairs = jax.eval_shape(evaluator.shared_weights, params), None
    pairs = jax.eval_shape(evaluator.member_pairs, params, members)
    prompts = [[i] * args.prompt for i in (1, 2)]  # they share no prefix
    packed = engine.packing(prompts).pack(prompts[:1], rows=1)
    rows = type(packed)(*(np.broadcast_to(x, (args.members, *x.shape)) for x in packed[:2]), packed.prefix)
    stats = Evaluator._decode.lower(evaluator, (shared, pairs), rows).compile().memory_analysis()
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    itemsize = jnp.dtype(args.dtype).itemsize
    cache = 2 * config.layers * config.kv_heads * config.head_dim * (args.prompt + NEW) * itemsize * args.members
    model = 4 * count(params)
    beyond = size(pairs) + stats.temp_size_in_bytes + stats.output_size_in_bytes - cache
    result = {
        "what": f"decoding, {args.members} members at once, prompts of {args.prompt}, {NEW} new tokens, {args.dtype}",
        "pairs": size(pairs), "cache": cache, "temporary": stats.temp_size_in_bytes,
        "beyond weights and caches, of a float32 model": beyond / model,
    }  # fmt: skip
    anchor = {"penalty": "l2", "strength": STRENGTH}
    update_config = freeze({"es": {"noise": "low_rank", "population": 1024}, "optim": {"anchor": anchor}})
    whole = State(update_config, mesh, jax.device_put(params, param_shardings(mesh, params)))
    stats = states.update_on(mesh).lower(*whole.update_arguments(entry_of(1024))).compile().memory_analysis()
    largest = max(4 * leaf.size for _, leaf in named_leaves(params))
    grown = stats.output_size_in_bytes - stats.alias_size_in_bytes
    result["update at N = 1024, beyond θ and optimizer state, of the largest leaf"] = (
        stats.temp_size_in_bytes + grown
    ) / largest
    if not write_json(result, args.json):
        for name, value in result.items():
            print(f"{name}: {value}")


def entry_of(population: int) -> Entry:
    rewards = np.random.default_rng(0).standard_normal(population)
    members = Population(population, seed=0).members(1)
    return Entry.of(1, members, rewards=rewards, weights=z_score(rewards).astype(np.float32))


def update(args: argparse.Namespace) -> None:
    zeros, mesh, entry = smollm2(args.layers)[1], make_mesh(1, 1), entry_of(1024)

    def side(noise: str) -> Call:
        es = {"population": 1024, "noise": noise} | ({"rank": args.rank} if noise == "low_rank" else {})
        config = freeze({"es": es, "optim": {"anchor": {"penalty": "l2", "strength": STRENGTH}}})
        state = State(config, mesh, jax.device_put(jax.tree.map(jnp.copy, zeros), param_shardings(mesh, zeros)))

        def call() -> None:
            state.apply(entry)
            jax.block_until_ready(state.drift)

        return call

    seconds = in_turn({"low rank": side("low_rank"), "full rank": side("gaussian")}, repeats=args.repeats)
    title = f"update of {count(zeros):,} weights, N = 1024, l2 anchor"
    report(title, seconds, ours="low rank", json_to=args.json, rank=args.rank)


PARTS = {"iteration": iteration, "lab": lab_steps, "memory": memory, "update": update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--data", help="folder of GSM8K rows")
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--together", nargs="+", type=int, default=[1, 4], help="numbers of full-rank members at once to try"
    )
    parser.add_argument("--full-members", type=int, help="members on which full rank is timed; all by default")
    parser.add_argument("--torch", action="store_true", help="also time torch and transformers")
    parser.add_argument("--layers", type=int, default=30, help="N for memory and update")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, for memory")
    parser.add_argument("--repeats", type=int, default=2)
    add_json(parser)
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
