"""What generating costs: prefill, a decode step, the bound of a decode step, and what a shared prefix spares.

Command:  python -m benchmarks.decode [--parts=step,prefix] [--repeats=5] [--json[=FILE]]
Cost:     --repeats=3: 1.5 minutes on 2 CPU cores.
Result:   step 0.107 s, its bare products 0.122 s; a prefill of which 96 of 128 tokens are shared is 3.9 times as fast.

Random weights; no row stops. The parts:

- step: SmolLM2-135M's shape in float32, 32 prompts of 128 tokens, 33 new tokens. A step's time is the difference of
  runs of 33 tokens and of 1, over 32. The bound is the same products alone (all kernels of all layers, scores and
  mixtures over as many places, the output head), in a loop of as many turns, timed in turn with the engine. Medians.
- prefix: a prefill of 32 prompts of 128 tokens, of which 96 are shared, against the same prompts without sharing.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import add_json, in_turn, write_json
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Packing
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer

SMOLLM2 = TransformerConfig(
    family="llama", vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_dim=1536
)
SLOTS, PROMPT, NEW, SHARED = 32, 128, 33, 96


def weights(config: TransformerConfig) -> Any:
    """Random ones, laid out for an engine."""
    return jax.jit(lambda key: _engine(config, 1).layout(Transformer(config).init(key)))(jax.random.key(0))


def _engine(config: TransformerConfig, new: int) -> Engine:
    return Engine(config, slots=SLOTS, max_prompt=PROMPT, max_new=new, stop=())


def call(config: TransformerConfig, params: Any, *, new: int = NEW, shared: int = 0) -> Callable:
    """A compiled call of the engine on SLOTS prompts of PROMPT tokens, the first `shared` alike."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, config.vocab_size, (SLOTS, PROMPT))
    tokens[:, :shared] = tokens[:1, :shared]
    rows = Packing(tuple(tokens[0, :shared].tolist()), PROMPT - shared).pack(tokens.tolist(), rows=SLOTS)
    decode = jax.jit(lambda params, rows: _engine(config, new).decode(params, *rows[:2], prefix=rows[2]))
    program = decode.lower(params, rows).compile()
    return lambda: program(params, rows)


def bare_products(config: TransformerConfig, params: Any, *, turns: int, rows: int = SLOTS) -> Callable:
    """The matrix products of `turns` decode steps, with next to nothing between them."""
    places, groups = PROMPT + NEW, config.heads // config.kv_heads
    k = jnp.ones((config.layers, rows, config.kv_heads, config.head_dim, places))
    v = jnp.ones((config.layers, rows, config.kv_heads, places, config.head_dim))

    def layer(x: Any, w: Any, k: Any, v: Any) -> Any:
        q, new = x @ w["attn"]["q"]["kernel"], x @ w["attn"]["k"]["kernel"] + x @ w["attn"]["v"]["kernel"]
        scores = q.reshape(rows, config.kv_heads, groups, config.head_dim) @ k
        mixed = (scores @ v).reshape(rows, -1)
        y = mixed @ w["attn"]["o"]["kernel"] + jnp.mean(new)
        return (y @ w["mlp"]["gate"]["kernel"] + y @ w["mlp"]["up"]["kernel"]) @ w["mlp"]["down"]["kernel"]

    def run(x: Any, k: Any, v: Any, params: Any) -> Any:
        def turn(_: Any, x: Any) -> Any:
            for i, w in enumerate(params["layers"]):
                x = 1e-3 * layer(x, w, k[i], v[i])
            return x + jnp.max(x @ params["embed"]["embedding"].T, axis=1, keepdims=True)

        return jax.lax.fori_loop(0, turns, turn, x)

    x = jnp.ones((rows, config.width))
    program = jax.jit(run).lower(x, k, v, params).compile()
    return lambda: program(x, k, v, params)


def timed(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn; a first round does not count."""
    waited = {name: lambda f=function: jax.block_until_ready(f()) for name, function in functions.items()}
    return {name: float(np.median(times)) for name, times in in_turn(waited, repeats=repeats).items()}


def step(repeats: int) -> dict[str, float]:
    params = weights(SMOLLM2)
    functions = {
        "whole": call(SMOLLM2, params),
        "prefill": call(SMOLLM2, params, new=1),
        "bound": bare_products(SMOLLM2, params, turns=NEW - 1),
    }
    found = timed(functions, repeats)
    one, bound = (found["whole"] - found["prefill"]) / (NEW - 1), found["bound"] / (NEW - 1)
    return {"prefill_seconds": found["prefill"], "step_seconds": one, "bound_seconds": bound, "over_bound": one / bound}


def prefix(repeats: int) -> dict[str, float]:
    params = weights(SMOLLM2)
    functions = {
        "apart": call(SMOLLM2, params, new=1),
        "shared": call(SMOLLM2, params, new=1, shared=SHARED),
    }
    found = timed(functions, repeats)
    return {f"{name}_seconds": s for name, s in found.items()} | {"gain": found["apart"] / found["shared"]}


PARTS = {"step": step, "prefix": prefix}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="names, with commas between")
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    args = parser.parse_args()
    result = {}
    for part in args.parts.split(","):
        result[part] = PARTS[part](args.repeats)
        if args.json != "-":
            print(part, json.dumps(result[part]), flush=True)
    write_json(result, args.json)


if __name__ == "__main__":
    main()
