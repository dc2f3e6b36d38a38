"""Tests whether a device makes the same noise as a CPU, to the last bit: a part of `benchmarks.chip`.

`stages` compares each stage of a number with the host's CPU: how many values differ, and by how many units in the last
place. The square roots cover all mantissas for both parities of the exponent: 2^24 values are all cases. `digests`
covers noise, members and updates as in a run; the digests of a CPU are in chip_digests.json.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from es_jax.core import threefry_normal
from es_jax.core.mesh import make_mesh, over_groups, to_devices
from es_jax.es.noise import GaussianNoise
from es_jax.es.population import Population
from es_jax.generate.engine import Engine
from es_jax.models.config import TransformerConfig
from es_jax.models.sharding import param_shardings
from es_jax.models.transformer import Transformer
from es_jax.rundir.seed_log import Entry
from es_jax.training.config import freeze
from es_jax.training.es import Evaluator
from es_jax.training.state import State

Call = Callable[..., Any]
KINDS: dict[str, dict[str, Any]] = {"full rank": {}, "antithetic": {"antithetic": True}}
MODEL = TransformerConfig(  # sizes that no block divides
    family="qwen2", vocab_size=519, width=104, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=139
)
PARAMS = {"a": np.zeros((257, 129), np.float32), "layers/b": np.zeros((3, 64, 65), np.float32)}


def on(device: jax.Device, call: Call, *args: Any) -> Any:
    """The result of the call on that device, as host arrays."""
    with jax.default_device(device):
        return jax.device_get(jax.jit(lambda *given: call(*given))(*jax.device_put(args, device)))


def differences(got: Any, expected: Any) -> dict[str, int]:
    """How many values differ, and the largest distance in units in the last place."""
    bits, ranks = [], []
    for values in (got, expected):
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(values)])
        bits.append(flat.view(np.uint32))
        rank = bits[-1].astype(np.int64)
        negative = (flat.dtype == np.float32) & (rank >= 2**31)  # their bits decrease as the number grows
        ranks.append(np.where(negative, 2**31 - rank, rank))
    different, distance = bits[0] != bits[1], np.abs(ranks[0] - ranks[1])
    return {"values": different.size, "different": int(different.sum()), "largest_ulp": int(distance.max())}


def digest(tree: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()[:16]


def words(n: int) -> tuple[jax.Array, jax.Array]:
    return threefry_normal.threefry((jnp.uint32(5), jnp.uint32(7)), threefry_normal.positions((n,)))


def stages(device: jax.Device, host: jax.Device, n: int) -> dict[str, Call]:
    """Parts that each compare one stage of a number, on the same input."""
    radius, angle = on(host, lambda: words(n))
    x = (np.arange(0, 2**24, 2**24 // n, dtype=np.int32) + np.int32(0x3F800000)).view(np.float32)  # in 1..4
    ieee = np.sqrt(x.astype(np.float64)).astype(np.float32)

    def same(call: Call, *args: Any) -> Call:
        return lambda: differences(on(device, call, *args), on(host, call, *args))

    return {
        "threefry": same(lambda: words(n)),
        "uint32 to float32": same(lambda word: word.astype(jnp.float32), radius),
        "-2 log": same(threefry_normal._minus_two_log, radius),
        "cosine": same(threefry_normal._cosine, angle),
        "the device's own square root": lambda: differences(on(device, jnp.sqrt, x), ieee),
        "square root": lambda: differences(on(device, threefry_normal._exact_sqrt, x), ieee),
        "box_muller": same(threefry_normal.box_muller, radius, angle),
    }


def digests(device: jax.Device) -> dict[str, str]:
    """Digests of noise and an estimate, and of a member and two updates by a run's own programs on that device."""
    weights = np.random.default_rng(0).standard_normal(30).astype(np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        members = jax.device_get(Population(30, seed=7, streams=1).members(3))
    noise = GaussianNoise()
    result = {
        "apply": digest(on(device, functools.partial(noise.apply, sigma=1.0), PARAMS, members[1])),
        "estimate": digest(on(device, noise.estimate, PARAMS, members, weights)),
    }
    return result | {f"{name}, {kind}": value for kind in KINDS for name, value in of_a_run(device, kind).items()}


def of_a_run(device: jax.Device, kind: str) -> dict[str, str]:
    mesh = make_mesh(1, 1, devices=[device])
    optim = {"learning_rate": 0.1, "anchor": {"penalty": "l2", "strength": 0.05}}
    config = freeze({"model": {"dtype": "float32"}, "es": {"population": 30, **KINDS[kind]}, "optim": optim})
    numbers = np.random.default_rng(1)  # jax.random's normal numbers may have other bits elsewhere
    shapes = jax.eval_shape(Transformer(MODEL).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.02 * numbers.standard_normal(leaf.shape, np.float32), shapes)
    params = jax.device_put(params, param_shardings(mesh, params))
    engine = Engine(MODEL, slots=1, max_prompt_tokens=1, max_new_tokens=1, stop_token_ids=())
    population = Population(30, seed=7, antithetic=config.es.antithetic)
    lane = to_devices(population.members(3)[np.arange(1, 2)], over_groups(mesh))
    member = Evaluator.of(config, engine, mesh).perturb(params, lane)
    state = State(config, mesh, params)
    for step in (1, 2):
        rewards = np.random.default_rng(step).standard_normal(30)
        state.apply(Entry.of(step, population.members(step), rewards=rewards, weights=rewards.astype(np.float32)))
    return {"member": digest(stacked(member)), "updates": digest(state.params)}


def stacked(tree: Any) -> Any:
    """The weights with stacked layers; an engine may have them separately."""
    if isinstance(tree, dict) and isinstance(layers := tree.get("layers"), tuple):
        return {**tree, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}
    return tree
