"""Whether a chip makes the noise of a CPU to the last bit, and what the exact square root costs there.

Command:  python -m benchmarks.chip_bits [--tiny] [--json[=FILE]]
Cost:     63 seconds on an H100 beside 16 CPU cores.
Result:   docs/chip/noise_bits_h100.json: all stages but the device's own square root, and all results but those of
          antithetic pairs, have the CPU's bits; the mended root costs 12 % of perturbing and 39 % of the estimate.

The first rows compare each stage of a number with the host's CPU: values that differ, units in the last place. The
roots are of all mantissas, in both parities of the exponent: there are no others. Then come digests of perturbed
weights, of estimates and of updates, and times. "before" has the device's own square root, "after" the mended one.
"""

import argparse
import contextlib
import functools
import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.compare import add_json, write_json
from es_jax.core import threefry_normal
from es_jax.es.noise import GaussianNoise
from es_jax.es.population import Members, Population
from es_jax.optim.anchored import anchored_weight_decay

Call = Callable[..., Any]
PARAMS = {"a": np.zeros((257, 129), np.float32), "layers/b": np.zeros((3, 64, 65), np.float32)}
SIDES = ("before", "after")


def root_of(side: str) -> contextlib.AbstractContextManager[Any]:
    """Programs traced inside take the device's own root where the side is "before"."""
    return mock.patch.object(threefry_normal, "_exact_sqrt", jnp.sqrt) if side == "before" else contextlib.nullcontext()


def on(device: jax.Device, call: Call, *args: Any) -> Any:
    """What the call gives on that device, as host arrays; compiled anew, so that `root_of` counts."""
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
    highest = functools.partial(jax.lax.sqrt, accuracy=jax.lax.AccuracyMode.HIGHEST)

    def same(call: Call, *args: Any) -> Call:
        return lambda: differences(on(device, call, *args), on(host, call, *args))

    def numbers(side: str) -> dict[str, int]:
        with root_of(side):
            return same(threefry_normal.box_muller, radius, angle)()

    return {
        "threefry": same(lambda: words(n)),
        "uint32 to float32": same(lambda word: word.astype(jnp.float32), radius),
        "-2 log": same(threefry_normal._minus_two_log, radius),
        "cosine": same(threefry_normal._cosine, angle),
        "sqrt": lambda: differences(on(device, jnp.sqrt, x), ieee),
        "sqrt of the highest accuracy": lambda: differences(on(device, highest, x), ieee),
        "exact sqrt": lambda: differences(on(device, threefry_normal._exact_sqrt, x), ieee),
        **{f"box_muller {side}": functools.partial(numbers, side) for side in SIDES},
    }


def perturbed(params: Any, member: Members) -> Any:
    return GaussianNoise().apply(params, member, sigma=1.0)


def updated(params: Any, members: Members, weights: jax.Array) -> Any:
    optimizer = optax.chain(optax.sgd(0.1), anchored_weight_decay(0.005))
    gradient = GaussianNoise().estimate(params, members, weights)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


def digests(device: jax.Device, host: jax.Device) -> dict[str, Call]:
    """Parts that compare whole results, all mended and two of them not."""
    weights = np.random.default_rng(0).standard_normal(30).astype(np.float32)
    large = jax.tree.map(lambda leaf: 0.02 * np.random.default_rng(1).standard_normal(leaf.shape, np.float32), PARAMS)
    with jax.default_device(host):
        member = jax.device_get(Population(2, seed=7, streams=1).members(3)[1])
        both = jax.device_get(
            [Population(30, seed=7, antithetic=pairs, streams=1).members(3) for pairs in (False, True)]
        )
    cases: dict[str, tuple[Call, Any]] = {"apply": (perturbed, (PARAMS, member))}
    for name, members in zip(("", " antithetic"), both, strict=True):
        cases["estimate" + name] = (GaussianNoise().estimate, (PARAMS, members, weights))
        cases["update" + name] = (updated, (large, members, weights))

    def part(side: str, call: Call, args: Any) -> dict[str, Any]:
        with root_of(side):
            got, expected = (on(where, call, *args) for where in (device, host))
        digests = {"device": digest(got), "host": digest(expected)}
        return digests | {"equal": digests["device"] == digests["host"]} | differences(got, expected)

    kept = [("before", name) for name in ("apply", "estimate")] + [("after", name) for name in cases]
    return {f"{name} {side}": functools.partial(part, side, *cases[name]) for side, name in kept}


def timed(call: Call, *args: Any) -> list[float]:
    """Seconds of the first call, with its compilation, and of five more."""
    run, seconds = jax.jit(lambda *given: call(*given)), []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - began)
    return seconds


def times(n_apply: int, n_estimate: int) -> dict[str, Call]:
    """Parts that time the noise, and a program which only reads and writes the same bytes."""
    members = Population(8, seed=7, streams=1).members(3)

    def row(side: str, size: int, moved: int, call: Call, *args: Any) -> dict[str, Any]:
        with root_of(side):
            first, *seconds = timed(call, *args)
        median = statistics.median(seconds)
        rates = {"bytes_per_second": moved / median, "numbers_per_second": size / median}
        return {"first_s": first, "seconds": seconds, "median_s": median} | rates

    def leaf(n: int, dtype: Any) -> dict[str, jax.Array]:
        return {"w": jnp.zeros((n // 2**12, 2**12), dtype)}

    def apply(side: str) -> Call:
        return lambda: row(side, n_apply, 4 * n_apply, perturbed, leaf(n_apply, jnp.bfloat16), members[1])

    def estimate(side: str) -> Call:
        def call(weights: jax.Array) -> Any:
            like = {"w": jax.ShapeDtypeStruct((n_estimate // 2**12, 2**12), jnp.float32)}
            return GaussianNoise().estimate(like, members, weights)

        return lambda: row(side, 8 * n_estimate, 4 * n_estimate, call, jnp.ones(8))

    parts = {"copy": lambda: row("after", n_apply, 4 * n_apply, lambda x: -x, leaf(n_apply, jnp.bfloat16)["w"])}
    parts |= {f"apply {side}": apply(side) for side in SIDES}
    return parts | {f"estimate of 8 {side}": estimate(side) for side in SIDES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few numbers: to see that it runs")
    add_json(parser)
    args = parser.parse_args()
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    result: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    groups: dict[str, Call] = {
        "stages": lambda: stages(device, host, 2**12 if args.tiny else 2**24),
        "digests": lambda: digests(device, host),
        "times": lambda: times(*((2**16, 2**14) if args.tiny else (2**29, 2**28))),
    }
    for group, make in groups.items():
        rows = result[group] = {}
        for name, part in attempt(make, rows).items():
            rows[name] = {}
            began = time.perf_counter()
            rows[name] |= attempt(part, rows[name]) | {"part_s": round(time.perf_counter() - began, 2)}
            if args.json != "-":
                print(group, name, rows[name], flush=True)
    write_json(result, args.json)


def attempt(part: Call, errors: dict[str, Any]) -> dict[str, Any]:
    """What the part gives; nothing where it fails, and why among the errors."""
    try:
        return part()
    except Exception as error:
        errors["error"] = f"{type(error).__name__}: {error}"[:500]
        return {}


if __name__ == "__main__":
    main()
