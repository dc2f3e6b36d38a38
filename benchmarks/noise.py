"""Perturbing a model with the shape of SmolLM2-135M: ours with each generator, against torch in place and back.

Command:  python -m benchmarks.noise [--repeats=5] [--layers=30] [--json[=FILE]]
Cost:     half a minute on 2 CPU cores.
Result:   135M weights: ours 0.189 s, torch there and back 0.912 s (4.83 ×), ours with the threefry generator 1.467 s
          (`--repeats=7`).

Ours is the call in the training loop. It makes a member's weights in addition to the master weights, in the engine's
layout, and in the memory of the previous member if the generator allows layers to be made separately. Nothing has to be
restored. torch adds noise in place and subtracts it again, which is its cost per member. Both use float32 on all cores.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peer_torch
from benchmarks.compare import arguments, in_turn, report
from benchmarks.decode import SMOLLM2
from es_jax.core.mesh import make_mesh
from es_jax.core.tree import count, named_leaves
from es_jax.es.population import Population
from es_jax.generate.engine import Engine
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer
from es_jax.training.config import freeze
from es_jax.training.es import Evaluator


def smollm2(layers: int) -> tuple[TransformerConfig, Any]:
    """SmolLM2-135M with that many layers: its config, and weights of zeros."""
    config = dataclasses.replace(SMOLLM2, layers=layers)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
    return config, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)


def unstacked(params: Any) -> list[tuple[int, ...]]:
    """Shapes as in torch: one tensor per layer."""
    shapes = ((name, leaf.shape) for name, leaf in named_leaves(params))
    return [s for name, shape in shapes for s in ([shape[1:]] * shape[0] if "layers/" in name else [shape])]


def main() -> None:
    args = arguments(__doc__, repeats=5, layers=30)
    config, params = smollm2(args.layers)
    engine, mesh = Engine(config, slots=1, max_prompt_tokens=1, max_new_tokens=1, stop_token_ids=()), make_mesh(1, 1)
    members = Population(2, seed=0).members(1)[np.arange(1)]

    def ours(generator: str) -> Callable[[], None]:
        run = freeze({"model": {"dtype": "float32"}, "es": {"population": 2, "generator": generator}})
        evaluator = Evaluator.of(run, engine, mesh)

        copies: list[Any] = []

        def call() -> None:
            old = copies.pop() if copies else None
            copies.append(
                jax.block_until_ready(evaluator.perturb(params, members, old if evaluator.layer_by_layer else None))
            )

        return call

    torch_params = peer_torch.shapes_to_torch(unstacked(params))

    def torch_there_and_back() -> None:
        peer_torch.perturb(torch_params, 1, 1e-3)
        peer_torch.perturb(torch_params, 1, -1e-3)

    sides = {"ours": ours("threefry13"), "torch": torch_there_and_back, "ours, threefry": ours("threefry")}
    seconds = in_turn(sides, repeats=args.repeats)
    size = count(params)
    report(f"perturb {size:,} weights", seconds, ours="ours", json_to=args.json, weights=size)


if __name__ == "__main__":
    main()
