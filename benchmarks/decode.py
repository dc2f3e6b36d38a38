"""The cost of generation: prefill, a decode step and its bound, and the gain from a shared prefix.

Command:  python -m benchmarks.decode [--parts=step,step16,prefix,long] [--repeats=5] [--json[=FILE]]
Cost:     --repeats=3: 2.5 minutes on 2 CPU cores.
Result:   step 0.105 s, its products alone 0.118 s, at the rate of a large product 0.030 s; in bfloat16 0.061, 0.048 and
          0.0079 s. A prefill of which 96 of 128 tokens are shared is 3.9 times as fast. long, on two cores without
          AVX-512 and with other work running, --repeats=2: blocks 51.3 s, whole 58.2 s (1.13).

Random weights; no row stops. The parts:

- step: SmolLM2-135M's shape in float32, 32 prompts of 128 tokens, 33 new tokens. A step's time is the difference of
  runs of 33 tokens and of 1, over 32. It is compared with two bounds: the same products alone (all kernels of all
  layers, scores and mixtures over as many places, the output head), in a loop with as many iterations; and their
  operations at the rate of a product of two 4096 × 4096 matrices. All are timed in turn; results are medians.
- step16: the same in bfloat16.
- prefix: a prefill of 32 prompts of 128 tokens, of which 96 are shared, against the same prompts without sharing.
- long: a prefill of 8 prompts of 1024 tokens, with attention in blocks of queries, against all queries at once.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compare import add_json, in_turn, write_json
from es_jax.core import chunked_map
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Packing
from es_jax.models.config import TransformerConfig
from es_jax.models.layers import Transposed, linear
from es_jax.models.transformer import Transformer, param_shapes

SMOLLM2 = TransformerConfig(
    family="llama", vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_dim=1536
)
SLOTS, PROMPT, NEW, SHARED = 32, 128, 33, 96
LONG = (8, 1024)  # number of prompts, and tokens of each


def weights(config: TransformerConfig, dtype: Any = jnp.float32) -> Any:
    """Random weights in the layout of an engine."""

    def draw(key: Any) -> Any:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), Transformer(config).init(key))
        return _engine(config, (SLOTS, PROMPT), 1).layout(params)

    return jax.jit(draw)(jax.random.key(0))


def _engine(config: TransformerConfig, shape: tuple[int, int], new: int) -> Engine:
    return Engine(config, slots=shape[0], max_prompt_tokens=shape[1], max_new_tokens=new, stop_token_ids=())


def call(
    config: TransformerConfig, params: Any, *, shape: tuple[int, int] = (SLOTS, PROMPT), new: int = NEW, shared: int = 0
) -> Callable:
    """A compiled call of the engine on prompts [number, tokens] that share the first `shared` tokens."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    tokens[:, :shared] = tokens[:1, :shared]
    rows = Packing(tuple(tokens[0, :shared].tolist()), shape[1] - shared).pack(tokens.tolist(), rows=shape[0])
    decode = jax.jit(lambda params, rows: _engine(config, shape, new).decode(params, *rows[:2], prefix=rows[2]))
    program = decode.lower(params, rows).compile()
    return lambda: program(params, rows)


def bare_products(config: TransformerConfig, params: Any, *, turns: int, rows: int = SLOTS) -> Callable:
    """The matrix products of `turns` decode steps, with almost nothing between them."""
    places, groups, dtype = PROMPT + NEW, config.heads // config.kv_heads, params["embed"]["embedding"].dtype
    k = jnp.ones((config.layers, rows, config.kv_heads, config.head_dim, places), dtype)
    v = jnp.ones((config.layers, rows, config.kv_heads, places, config.head_dim), dtype)

    def times(x: Any, y: Any) -> Any:
        return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(dtype)

    def layer(x: Any, w: Any, k: Any, v: Any) -> Any:
        q, new = (linear(x, w["attn"][name]["kernel"]) for name in "qk")
        new = new + linear(x, w["attn"]["v"]["kernel"])
        scores = times(q.reshape(rows, config.kv_heads, groups, config.head_dim), k)
        y = linear(times(scores, v).reshape(rows, -1), w["attn"]["o"]["kernel"]) + jnp.mean(new)
        gate, up = (linear(y, w["mlp"][name]["kernel"]) for name in ("gate", "up"))
        return linear(gate + up, w["mlp"]["down"]["kernel"])

    def run(x: Any, k: Any, v: Any, params: Any) -> Any:
        def turn(_: Any, x: Any) -> Any:
            for i, w in enumerate(params["layers"]):
                x = layer(x, w, k[i], v[i]) * dtype.type(1e-3)
            logits = linear(x, Transposed(params["embed"]["embedding"]))
            return x + jnp.max(logits, axis=1, keepdims=True)

        return jax.lax.fori_loop(0, turns, turn, x)

    x = jnp.ones((rows, config.width), dtype)
    program = jax.jit(run).lower(x, k, v, params).compile()
    return lambda: program(x, k, v, params)


def large_products(dtype: Any, *, size: int = 4096) -> Callable:
    """A product of two square matrices, the fastest shape on a CPU."""
    x = jnp.ones((size, size), dtype)
    program = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)).lower(x).compile()
    return lambda: program(x)


def timed(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn; the first round does not count."""
    waited = {name: lambda f=function: jax.block_until_ready(f()) for name, function in functions.items()}
    return {name: float(np.median(times)) for name, times in in_turn(waited, repeats=repeats).items()}


def step(repeats: int, dtype: Any = jnp.float32) -> dict[str, float]:
    params, size = weights(SMOLLM2, dtype), 4096
    functions = {
        "whole": call(SMOLLM2, params),
        "prefill": call(SMOLLM2, params, new=1),
        "bare": bare_products(SMOLLM2, params, turns=NEW - 1),
        "large": large_products(dtype, size=size),
    }
    seconds = timed(functions, repeats)
    one, bare = (seconds["whole"] - seconds["prefill"]) / (NEW - 1), seconds["bare"] / (NEW - 1)
    shapes = param_shapes(SMOLLM2).items()
    matrices = sum(math.prod(shape) for name, shape in shapes if name.endswith(("kernel", "embedding")))
    attended = 2 * SMOLLM2.layers * SMOLLM2.heads * SMOLLM2.head_dim * (PROMPT + NEW)
    peak = SLOTS * (matrices + attended) / size**3 * seconds["large"]
    return {
        "prefill_seconds": seconds["prefill"], "step_seconds": one, "bare_seconds": bare, "over_bare": one / bare,
        "peak_seconds": peak, "over_peak": one / peak,
    }  # fmt: skip


def step16(repeats: int) -> dict[str, float]:
    return step(repeats, jnp.bfloat16)


def prefix(repeats: int) -> dict[str, float]:
    params = weights(SMOLLM2)
    functions = {
        "apart": call(SMOLLM2, params, new=1),
        "shared": call(SMOLLM2, params, new=1, shared=SHARED),
    }
    seconds = timed(functions, repeats)
    return {f"{name}_seconds": s for name, s in seconds.items()} | {"gain": seconds["apart"] / seconds["shared"]}


def long(repeats: int) -> dict[str, float]:
    params = weights(SMOLLM2)
    functions = {"blocks": call(SMOLLM2, params, shape=LONG, new=1)}
    limit, chunked_map.HELD = chunked_map.HELD, 2**40
    try:
        functions["whole"] = call(SMOLLM2, params, shape=LONG, new=1)
    finally:
        chunked_map.HELD = limit
    seconds = timed(functions, repeats)
    return {f"{name}_seconds": s for name, s in seconds.items()} | {"gain": seconds["whole"] / seconds["blocks"]}


PARTS = {"step": step, "step16": step16, "prefix": prefix, "long": long}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="names, separated by commas")
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
