"""The update of a model with the shape of SmolLM2-135M, with the l2 anchor: ours against torch.

Command:  python -m benchmarks.estimate [--population=30] [--layers=30] [--repeats=3] [--json[=FILE]]
Cost:     2 minutes on 2 CPU cores.
Result:   ours 3.03 s, torch 13.91 s (4.59 ×), ours without anchor 3.31 s.

Both draw all members' noise again, sum it with weights, take the step and pull toward the anchor, in float32 on all
cores. "ours, no anchor" is the same program without the pull, so the difference is the cost of the pull.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peer_torch
from benchmarks.compare import arguments, in_turn, report
from benchmarks.noise import smollm2, unstacked
from es_jax.core.mesh import make_mesh
from es_jax.core.tree import count
from es_jax.es.population import Population
from es_jax.es.shaping import z_score
from es_jax.models.sharding import param_shardings
from es_jax.rundir.seed_log import Entry
from es_jax.training.config import freeze
from es_jax.training.state import State


def main() -> None:
    args = arguments(__doc__, population=30, layers=30, repeats=3)
    zeros, mesh, population = smollm2(args.layers)[1], make_mesh(1, 1), args.population
    members = Population(population, seed=0).members(1)
    rewards = np.random.default_rng(0).standard_normal(population)
    entry = Entry.of(1, members, rewards=rewards, weights=z_score(rewards).astype(np.float32))

    def ours(penalty: str) -> Callable[[], None]:
        anchor = {"penalty": penalty} | ({"strength": 10.0} if penalty != "none" else {})
        config = freeze({"es": {"population": population}, "optim": {"anchor": anchor}})
        params = jax.device_put(jax.tree.map(jnp.copy, zeros), param_shardings(mesh, zeros))
        state = State(config, mesh, params)

        def call() -> None:
            state.apply(entry)
            jax.block_until_ready(state.drift)

        return call

    torch_params, anchor = (peer_torch.shapes_to_torch(unstacked(zeros)) for _ in range(2))

    def torch_update() -> None:
        peer_torch.update(torch_params, anchor, range(population), entry.weights, rate=5e-4, decay=5e-3)

    sides = {"ours": ours("l2"), "torch": torch_update, "ours, no anchor": ours("none")}
    seconds = in_turn(sides, repeats=args.repeats)
    size = count(zeros)
    title = f"update of {size:,} weights, N = {population}, l2 anchor"
    report(title, seconds, ours="ours", json_to=args.json, weights=size, population=population)


if __name__ == "__main__":
    main()
