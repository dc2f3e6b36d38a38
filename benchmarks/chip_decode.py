"""What a decode step costs on an accelerator: the engine's step, compiled in several ways, and attention kernels alone.

Command:  python -m benchmarks.chip_decode --json=decode.json [--model=Qwen/Qwen2.5-0.5B] [--rows=200] [--tiny]
Cost:     about 4 minutes on one GPU. It needs no hub and no weights: they are random, and nothing stops.
Result:   docs/speed.md has the tables, docs/chip/ the JSON.

A step attends 1247 prompt tokens and up to 32 new ones in every row. Its time is that of 33 new tokens less that of
one, over 32. The bound is the bytes that a step needs at least (each weight, key and value once) over the bandwidth of
a copy, which is measured in the same process. Every compilation is a process of its own, since flags of XLA are read
once. The kernels' times are of 16 calls in one program, each with keys and values of its own.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from es_jax.generate.engine import Engine
from es_jax.models.config import TransformerConfig
from es_jax.models.known_configs import published
from es_jax.models.transformer import Transformer

NO_MERGER = "--xla_gpu_dot_merger_threshold_mb=0"
LOOPS = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL"
VARIANTS = {  # name: (layers one after another, flags of XLA)
    "scan": (False, ""),
    "scan, no dot merger": (False, NO_MERGER),
    "unrolled": (True, ""),
    "unrolled, no dot merger": (True, NO_MERGER),
    "unrolled, no dot merger, loops in command buffers": (True, f"{NO_MERGER} {LOOPS}"),
}
NEW, CALLS = 33, 16
TINY = TransformerConfig(
    family="qwen2", vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=128, qkv_bias=True
)


def median(call: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
    """Seconds of the first call, and the median of the others."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return seconds[0], float(np.median(seconds[1:]))


def bandwidth(numbers: int) -> float:
    """Bytes read and written a second by a large copy."""
    x = jnp.ones(numbers, jnp.float32)
    return 8 * numbers / median(functools.partial(jax.jit(lambda x: x + 1), x))[1]


def step_bytes(config: TransformerConfig, params: Any, rows: int, places: int) -> int:
    """The least that a step moves: every weight once (a tied embedding once), every key and value once."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return weights + 2 * 2 * config.layers * config.kv_heads * config.head_dim * rows * places


def step(config: TransformerConfig, *, rows: int, prompt: int, unroll: bool) -> dict[str, float]:
    """Seconds of compiling, of a prefill and of a decode step, and the bound."""
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), Transformer(config).init(key)))(
        jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, config.vocab_size - 5, prompt).tolist() for _ in range(rows)]
    result: dict[str, float] = {}
    for new in (1, NEW):
        engine = Engine(
            config, slots=rows, max_prompt_tokens=prompt, max_new_tokens=new, stop_token_ids=(), unroll=unroll
        )
        weights, packed = jax.jit(engine.layout)(params), engine.packing(prompts).pack(prompts, rows=rows)
        decode = jax.jit(lambda p, t, q, pre, engine=engine: engine.decode(p, t, q, prefix=pre).tokens)
        first, seconds = median(lambda decode=decode, w=weights, a=packed: decode(w, *a), 3)
        result |= {f"compile_{new}_s": first - seconds, f"seconds_{new}": seconds}
    least = step_bytes(config, params, rows, prompt + NEW // 2)
    speed = bandwidth(2**22 if rows < 32 else 2**29)
    result |= {"prefill_s": result["seconds_1"], "step_s": (result[f"seconds_{NEW}"] - result["seconds_1"]) / (NEW - 1)}
    return result | {"least_bytes": least, "bandwidth": speed, "times_bound": result["step_s"] * speed / least}


def attention_calls(heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[str, Callable]]:
    """Kernels for one token a row: name → (layout of the cache, function of q [B, N, H], k, v, lengths [B])."""
    group = heads // kv_heads

    def einsum(q, k, v, lengths):  # as the engine keeps them: k [B, K, H, S], v [B, K, S, H]
        q = q.reshape(len(q), kv_heads, group, head_dim)
        scores = jax.lax.dot_general(q, k, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.arange(k.shape[3]) < lengths[:, None, None, None], scores * head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jax.lax.dot_general(weights, v, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
        return out.reshape(len(q), heads, head_dim).astype(q.dtype)

    def library(kind):
        def call(q, k, v, lengths):  # k, v [B, S, K, H]
            return jax.nn.dot_product_attention(
                q[:, None], k, v, key_value_seq_lengths=lengths, query_seq_lengths=jnp.ones_like(lengths),
                implementation=kind,
            )[:, 0]  # fmt: skip

        return call

    def pallas(splits):
        def call(q, k, v, lengths):  # k, v [B, K, S, H]
            from jax.experimental.pallas.ops.gpu.decode_attention import decode_attn_unbatched

            one = functools.partial(decode_attn_unbatched, sm_scale=head_dim**-0.5, k_splits=splits)
            one = functools.partial(one, block_h=16, block_k=128, num_warps=None, num_stages=2, grid=None)
            one = functools.partial(one, interpret=False, debug=False, return_residuals=False, normalize_output=True)
            none = jnp.zeros((len(q), kv_heads), jnp.int32)
            ends = jnp.broadcast_to(lengths[:, None], none.shape)
            out = jax.vmap(jax.vmap(one))(q.reshape(len(q), kv_heads, group, head_dim), k, v, none, ends)
            return out.reshape(len(q), heads, head_dim)

        return call

    kernels = {"einsum": ("BKHS", einsum), "jax.nn, xla": ("BSKH", library("xla"))}
    kernels["jax.nn, cudnn"] = ("BSKH", library("cudnn"))
    return kernels | {f"pallas, {n} splits": ("BKSH", pallas(n)) for n in (2, 5, 10)}


def attention(config: TransformerConfig, *, rows: int, places: int, calls: int = CALLS) -> dict[str, Any]:
    """Seconds a call of every kernel, all rows full and lengths spread evenly, beside the bound of its live bytes."""
    keys = jax.random.split(jax.random.key(0), 3)  # a benchmark's own
    shape = (calls, rows, places, config.kv_heads, config.head_dim)
    q = jax.random.normal(keys[0], (rows, config.heads, config.head_dim), jnp.bfloat16)
    k, v = (jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))(key) for key in keys[1:])
    turn = jax.jit(lambda x, *axes: x.transpose(0, 1, *axes), static_argnums=(1, 2, 3))
    caches = {
        "BSKH": (list(k), list(v)),
        "BKHS": (list(turn(k, 3, 4, 2)), list(turn(v, 3, 2, 4))),
        "BKSH": (list(turn(k, 3, 2, 4)), list(turn(v, 3, 2, 4))),
    }
    del k, v
    lengths = {
        "full": np.full(rows, places, np.int32),
        "even": np.linspace(places // 5, places, rows).astype(np.int32),
    }
    result: dict[str, Any] = {"rows": rows, "places": places, "bandwidth": bandwidth(2**22 if rows < 32 else 2**29)}
    reference: dict[str, np.ndarray] = {}
    for name, (layout, kernel) in attention_calls(config.heads, config.kv_heads, config.head_dim).items():
        for how, length in lengths.items():

            @jax.jit
            def program(q, caches, length, kernel=kernel):
                for k, v in zip(*caches, strict=True):
                    q = (q + kernel(q, k, v, length)).astype(q.dtype)  # one call after the other
                return q

            try:
                once = jax.jit(kernel)(q, caches[layout][0][0], caches[layout][1][0], jnp.asarray(length))
                out = np.asarray(once, np.float32)
                seconds = median(lambda p=program, c=caches[layout], n=length: p(q, c, n))[1] / calls
                error = float(np.abs(out - reference.setdefault(how, out)).max())
                least = 2 * 2 * config.kv_heads * config.head_dim * int(length.sum())
                bound = seconds * result["bandwidth"] / least
                result[f"{name}, {how}"] = {"seconds": seconds, "times_bound": bound, "max_difference": error}
            except Exception as problem:  # one kernel that does not compile leaves the others
                result[f"{name}, {how}"] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    return result


def child(part: str, args: argparse.Namespace) -> Any:
    """One part of the measurement in this process."""
    config = TINY if args.tiny else published(args.model)
    rows, prompt = (4, 24) if args.tiny else (args.rows, 1247)
    if part == "attention":
        return attention(config, rows=rows, places=32 if args.tiny else 1280)
    return step(config, rows=rows, prompt=prompt, unroll=VARIANTS[part][0])


def main() -> None:
    """All parts, each in a process of its own; a part that fails leaves the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="chip_decode.json")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="a check on a CPU")
    parser.add_argument("--parts", nargs="*", default=[*VARIANTS, "attention"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args)))
        return
    device = "import jax; print(jax.devices()[0].device_kind, '| JAX', jax.__version__)"
    about = subprocess.run([sys.executable, "-c", device], capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {"device": about, "model": args.model, "rows": args.rows, "tiny": args.tiny}
    for part in args.parts:
        flags = os.environ.get("XLA_FLAGS", "") + " " + VARIANTS.get(part, (False, ""))[1]
        command = [sys.executable, "-m", "benchmarks.chip_decode", *sys.argv[1:], "--child", part]
        env = os.environ | {"XLA_FLAGS": flags.strip()}
        try:
            run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
            result[part] = json.loads(run.stdout.splitlines()[-1]) if not run.returncode else run.stderr[-500:]
        except subprocess.TimeoutExpired:
            result[part] = "took more than 200 s"
        print(part, json.dumps(result[part]), flush=True)
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
