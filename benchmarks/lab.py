"""Member evaluations per second with the laboratory model: ours against torch, with `generate` and with a hand-written
loop.

Command:  python -m benchmarks.lab [--repeats=5] [--members=8] [--json[=FILE]]
Needs:    EXTRAS=verify for torch.
Cost:     10 s on 2 CPU cores.
Result:   ours 157 members per second, torch 77 with generate (2.05 ×) and 91 by hand (1.72 ×). docs/speed.md

A member is perturbed, decodes 64 lab-countdown prompts greedily, at most 6 new tokens, and is graded. The peer's member
is perturbed and restored in place; "torch, by hand" decodes with a loop of a few lines over the same network and its
cache, without the overhead of `generate`. Ours evaluates 4 members in a call, on one device with all cores, and once
more with one device per core, which share the members (`JAX_NUM_CPU_DEVICES`).
"""

import os
import tempfile

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import peer_torch
from benchmarks.compare import arguments, in_turn, report
from es_jax.core.mesh import make_mesh, replicated
from es_jax.es.population import Population
from es_jax.generate.engine import Engine
from es_jax.scoring.grading import Grader
from es_jax.scoring.workers import at_once
from es_jax.tasks import get_task
from es_jax.training.config import freeze
from es_jax.training.es import Evaluator
from es_jax.weights.model import load_model, save_model
from es_jax.weights.tokenizer import encode_prompt

PROMPTS, MAX_NEW, SIGMA = 64, 6, 0.01


def main() -> None:
    args = arguments(__doc__, repeats=5, members=8)
    model, task = load_model("lab"), get_task("lab-countdown")
    examples = task.train(PROMPTS)
    prompts = [encode_prompt(model.tokenizer, e.prompt) for e in examples]
    everyone = range(PROMPTS)
    engine = Engine(
        model.config, slots=PROMPTS, max_prompt_tokens=16, max_new_tokens=MAX_NEW, stop_token_ids=model.stop_token_ids
    )
    es = {"population": args.members, "sigma": SIGMA}
    config = freeze({"es": es, "decode": {"members_at_once": min(4, args.members)}})
    rows = engine.packing(prompts).pack(prompts, rows=PROMPTS)
    members, rewards = Population(args.members, seed=0).members(1), []

    def ours(devices: int):
        mesh = make_mesh(devices, 1)
        evaluator, params = Evaluator.of(config, engine, mesh), jax.device_put(model.params, replicated(mesh))

        def call() -> None:
            grader = Grader(model, examples, at_once(task), prompts)
            for _, tokens, length in evaluator.members(params, members, rows):
                rewards.append(np.mean([one().score.reward for one in grader(everyone, tokens, length)]))

        return call

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def peer(generate):
        def call() -> None:
            grader = Grader(model, examples, at_once(task), prompts)
            for seed in range(args.members):
                peer_torch.perturb(list(net.parameters()), seed, SIGMA)
                tokens = generate(net, prompts)
                length = np.array([_length(row, model.stop_token_ids) for row in tokens.tolist()])
                rewards.append(np.mean([one().score.reward for one in grader(everyone, tokens, length)]))
                peer_torch.perturb(list(net.parameters()), seed, -SIGMA)

        return call

    stop = model.stop_token_ids[0]
    sides = {
        "ours": ours(1),
        "ours, a device a core": ours(len(jax.devices())),
        "torch, generate": peer(lambda net, prompts: peer_torch.generate(net, prompts, MAX_NEW, stop=stop)),
        "torch, by hand": peer(lambda net, prompts: peer_torch.by_hand(net, prompts, MAX_NEW, stop=stop)),
    }
    seconds = in_turn(sides, repeats=args.repeats)
    rate = {name: round(args.members / float(np.median(times)), 1) for name, times in seconds.items()}
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    title = f"{args.members} members of {size:,} weights, {PROMPTS} prompts, at most {MAX_NEW} new tokens"
    report(title, seconds, ours="ours", json_to=args.json, members_a_second=rate, mean_reward=float(np.mean(rewards)))


def _length(row: list[int], stops: tuple[int, ...]) -> int:
    """Tokens up to and including the first stop token."""
    return next((i + 1 for i, token in enumerate(row) if token in stops), len(row))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # before JAX starts its backend
    main()
