"""How the cost of an iteration grows with members, prompts, new tokens, weights and devices: a table, a plot,
exponents.

Command:  python -m benchmarks.growth [--repeats=3] [--plot=docs/growth.png] [--json[=FILE]]
Cost:     --repeats=2: 4.4 minutes on 2 CPU cores.
Result:   docs/speed.md: exponents of members .99, prompts 1.01, tokens .92, weights 1.18, devices −.12.

It times a whole iteration without grading: perturb, decode, estimate, and update with the l2 anchor. Weights are random
in float32, and no row stops. Each size is varied alone, with the others as in BASE. The exponent is that of the
best-fitting power law; 1 means proportional. The devices are virtual ones that share the machine's cores, so they show
the cost of splitting the work (0 would be none), not the gain from more chips.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.compare import add_json, in_turn, write_json
from es_jax.core.mesh import make_mesh
from es_jax.core.tree import count
from es_jax.es.population import Population
from es_jax.generate.engine import Engine
from es_jax.models.config import TransformerConfig
from es_jax.models.sharding import param_shardings
from es_jax.models.transformer import Transformer
from es_jax.rundir.seed_log import Entry
from es_jax.training.config import freeze
from es_jax.training.es import Evaluator
from es_jax.training.state import State

MODEL = TransformerConfig(
    family="llama", vocab_size=2048, width=256, layers=2, heads=4, kv_heads=2, head_dim=64, mlp_dim=768
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of an iteration."""

    members: int = 8
    prompts: int = 32
    tokens: int = 32
    layers: int = 2
    devices: int = 1


BASE, PROMPT = Sizes(), 64
AXES = {
    "members": (8, 16, 32, 64),
    "prompts": (32, 64, 128, 256),
    "tokens": (32, 64, 128, 256),
    "layers": (2, 6, 18),
    "devices": (1, 2, 4, 8),
}


def iteration(sizes: Sizes) -> tuple[Callable[[], None], int]:
    """A function that runs one iteration, and the model's weights."""
    model = dataclasses.replace(MODEL, layers=sizes.layers)
    es, anchor = {"population": sizes.members}, {"penalty": "l2", "strength": 10.0}
    config = freeze({"es": es, "optim": {"anchor": anchor}})
    mesh, draw = make_mesh(sizes.devices, 1), np.random.default_rng(0)
    params = jax.jit(Transformer(model).init)(jax.random.key(0))
    state = State(config, mesh, jax.device_put(params, param_shardings(mesh, params)))
    engine = Engine(model, slots=32, max_prompt_tokens=PROMPT, max_new_tokens=sizes.tokens, stop_token_ids=())
    prompts = draw.integers(0, model.vocab_size, (sizes.prompts, PROMPT)).tolist()
    rows = engine.packing(prompts).pack(prompts, rows=sizes.prompts)
    evaluator, members = Evaluator.of(config, engine, mesh), Population(sizes.members, seed=0).members(1)

    def call() -> None:
        rewards = np.array([np.mean(tokens) for _, tokens, _ in evaluator.members(state.params, members, rows)])
        weights = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        state.apply(Entry.of(1, members, rewards=rewards, weights=weights, rates=config.rates(1)))
        float(state.drift)

    return call, count(state.params)


def grown(axis: str, repeats: int) -> dict[str, Any]:
    """Seconds by size along an axis (by weights for layers), and the exponent."""
    iterations = {size: iteration(dataclasses.replace(BASE, **{axis: size})) for size in AXES[axis]}
    seconds = in_turn({str(size): call for size, (call, _) in iterations.items()}, repeats=repeats)
    sizes = [weights if axis == "layers" else size for size, (_, weights) in iterations.items()]
    medians = [float(np.median(times)) for times in seconds.values()]
    exponent = float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])
    return {"sizes": sizes, "seconds": medians, "exponent": exponent}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| what grows | sizes | seconds | exponent |", "|---|---|---|---|"]
    for axis, row in rows.items():
        name = "weights" if axis == "layers" else axis
        sizes, seconds = ", ".join(f"{s:,}" for s in row["sizes"]), ", ".join(f"{s:.2f}" for s in row["seconds"])
        lines.append(f"| {name} | {sizes} | {seconds} | {row['exponent']:.2f} |")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots seconds against the size relative to the smallest, both on a log2 scale."""
    picture = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    axes = picture.subplots()
    for marker, (axis, row) in zip("os^vD", rows.items(), strict=False):
        name = "weights" if axis == "layers" else axis
        label = f"{name}, from {row['sizes'][0]:,}: exponent {row['exponent']:.2f}"
        axes.plot(np.array(row["sizes"]) / row["sizes"][0], row["seconds"], marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="size relative to the smallest", ylabel="seconds of an iteration")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--axes", default=",".join(AXES), help="names, separated by commas")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    add_json(parser)
    args = parser.parse_args()
    rows = {axis: grown(axis, args.repeats) for axis in args.axes.split(",")}
    if not write_json(rows, args.json):
        print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
