"""Whether a device makes the noise of a CPU to the last bit: a part of `benchmarks.chip`.

`stages` compares each stage of a number with the host's CPU: values that differ, units in the last place. The roots are
of mantissas in both parities of the exponent: of 2^24 values these are all there are. `digests` are of perturbed
weights, of estimates and of updates; those of a CPU are in chip_digests.json.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from es_jax.core import threefry_normal
from es_jax.es.low_rank import LowRankNoise
from es_jax.es.noise import GaussianNoise
from es_jax.es.population import Members, Population
from es_jax.optim.anchored import anchored_weight_decay

Call = Callable[..., Any]
PARAMS = {"a": np.zeros((257, 129), np.float32), "layers/b": np.zeros((3, 64, 65), np.float32)}


def on(device: jax.Device, call: Call, *args: Any) -> Any:
    """What the call gives on that device, as host arrays."""
    with jax.default_device(device):
        return jax.device_get(jax.jit(lambda *given: call(*given))(*jax.device_put(args, device)))


def differences(got: Any, expected: Any) -> dict[str, int]:
    """How many values have other bits, and the largest distance in units in the last place."""
    bits, ranks = [], []
    for values in (got, expected):
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(values)])
        bits.append(flat.view(np.uint32))
        rank = bits[-1].astype(np.int64)
        negative = (flat.dtype == np.float32) & (rank >= 2**31)  # of those the bits fall as the number grows
        ranks.append(np.where(negative, 2**31 - rank, rank))
    different, distance = bits[0] != bits[1], np.abs(ranks[0] - ranks[1])
    return {"values": different.size, "different": int(different.sum()), "largest_ulp": int(distance.max())}


def digest(tree: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()[:16]


def words(n: int) -> tuple[jax.Array, jax.Array]:
    return threefry_normal.threefry((jnp.uint32(5), jnp.uint32(7)), threefry_normal.positions((n,)))


def stages(device: jax.Device, host: jax.Device, n: int) -> dict[str, Call]:
    """Parts that compare one stage of a number each, on the same input."""
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


def perturbed(params: Any, member: Members) -> Any:
    return GaussianNoise().apply(params, member, sigma=1.0)


def updated(params: Any, members: Members, weights: jax.Array) -> Any:
    optimizer = optax.chain(optax.sgd(0.1), anchored_weight_decay(0.005))
    gradient = GaussianNoise().estimate(params, members, weights)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


def digests(device: jax.Device) -> dict[str, str]:
    """Of what a step makes of noise on that device."""
    weights = np.random.default_rng(0).standard_normal(30).astype(np.float32)
    large = jax.tree.map(lambda leaf: 0.02 * np.random.default_rng(1).standard_normal(leaf.shape, np.float32), PARAMS)
    with jax.default_device(jax.devices("cpu")[0]):
        member = jax.device_get(Population(2, seed=7, streams=1).members(3)[1])
        plain, pairs = jax.device_get([
            Population(30, seed=7, antithetic=antithetic, streams=1).members(3) for antithetic in (False, True)
        ])  # fmt: skip
    low_rank = LowRankNoise(stacked="layers/")
    cases: dict[str, tuple[Call, Any]] = {
        "apply": (perturbed, (PARAMS, member)),
        "estimate": (GaussianNoise().estimate, (PARAMS, plain, weights)),
        "update": (updated, (large, plain, weights)),
        "estimate antithetic": (GaussianNoise().estimate, (PARAMS, pairs, weights)),
        "update antithetic": (updated, (large, pairs, weights)),
        "pair of rank 1": (functools.partial(low_rank.pair, sigma=1.0), (PARAMS, member)),
        "estimate of rank 1": (low_rank.estimate, (PARAMS, plain, weights)),
    }
    return {name: digest(on(device, call, *args)) for name, (call, args) in cases.items()}
