"""Perturbing a model of SmolLM2-135M's shape: ours, with each generator, against torch in place and back.

Command:  python -m benchmarks.noise [--repeats=5] [--layers=30] [--json[=FILE]]
Cost:     half a minute on 2 CPU cores.
Result:   135M weights: ours fresh 0.278 s, torch there and back 1.000 s (3.59 ×), ours reused 0.152 s (torch: 6.6 ×),
          ours with the threefry generator 1.376 s.

Ours makes a member's weights beside the master weights, so there is nothing to restore; torch adds noise in place and
takes it away again, which is what a member costs it. Both are float32 on all cores. "reused" writes into the buffers of
the member before (the engine's own layout is not made here); "fresh" pays for new pages of memory.
"""

import functools
import math

import jax
import jax.numpy as jnp

from benchmarks import peer_torch
from benchmarks.compare import arguments, in_turn, report
from es_jax.core import rng
from es_jax.es.noise import GaussianNoise
from es_jax.es.population import Population
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import param_shapes


def smollm2(layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of SmolLM2-135M's leaves, with that many layers."""
    return param_shapes(
        TransformerConfig(
            family="llama", vocab_size=49152, width=576, layers=layers, heads=9, kv_heads=3, head_dim=64, mlp_dim=1536,
            tied_embeddings=True,
        )
    )  # fmt: skip


def unstacked(shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """As torch holds them: a tensor a layer."""
    return [s for name, shape in shapes.items() for s in ([shape[1:]] * shape[0] if "layers/" in name else [shape])]


def main() -> None:
    args = arguments(__doc__, repeats=5, layers=30)
    shapes = smollm2(args.layers)
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    member = Population(2, seed=0).members(1)[0]
    held = {}

    def ours(generator: str) -> None:
        apply = perturb(generator)
        held[generator] = jax.block_until_ready(apply(params, member))

    @functools.cache
    def perturb(generator: str):
        noise = GaussianNoise(generator)
        return jax.jit(lambda params, member: noise.apply(params, member, sigma=1e-3))

    @functools.cache
    def into(generator: str):
        noise = GaussianNoise(generator)
        call = lambda old, params, member: noise.apply(params, member, sigma=1e-3)  # noqa: E731
        return jax.jit(call, donate_argnums=0, keep_unused=True)

    def reused() -> None:
        old = held.pop("reused", None) or jax.tree.map(jnp.zeros_like, params)
        held["reused"] = jax.block_until_ready(into(rng.DEFAULT)(old, params, member))

    torch_params = peer_torch.shapes_to_torch(unstacked(shapes))

    def torch_there_and_back() -> None:
        peer_torch.perturb(torch_params, 1, 1e-3)
        peer_torch.perturb(torch_params, 1, -1e-3)

    sides = {
        "ours, fresh": lambda: ours("threefry13"),
        "torch": torch_there_and_back,
        "ours, reused": reused,
        "ours, threefry": lambda: ours("threefry"),
    }
    seconds = in_turn(sides, repeats=args.repeats)
    size = sum(math.prod(shape) for shape in shapes.values())
    report(f"perturb {size:,} weights", seconds, ours="ours, fresh", json_to=args.json, weights=size)


if __name__ == "__main__":
    main()
