"""Does a generator of noise draw N(0, 1)? A battery of tests; each result is a standard normal score.

Command:  python -m benchmarks.battery [--generator=threefry13] [--numbers=1073741824] [--json]
Cost:     6 minutes on 2 CPU cores
Result:   threefry13: passed, 76 scores, the largest −2.73 (other leaf, squares), 2.17 (lag 63) and 1.77 (tail −4.5);
          the tails beyond 5.5 σ, where 20 numbers are expected on each side, 0.50 and −0.16. Half the numbers: −2.28
          (lag 127), −1.99 (lag 16, squares) and 1.82 (member one bit away).

What is tested, on numbers drawn in chunks of 2²² for as many (member, leaf) pairs:

- uniformity: Φ(z) in 1024 bins, χ²;
- the first six moments;
- tails: how many numbers lie beyond 3, 4, 4.5, 5 and 5.5 σ, on each side, against Poisson counts;
- serial and lag correlation of z and of z² − 1, at lags that are powers of two, their neighbours, and odd ones;
- independence of members, leaves and steps, and of seeds that differ by one or in one bit: the same two correlations
  between numbers at the same position, and Φ of the pair in a grid of 32 × 32, χ²;
- determinism: equal seeds, equal bits.

A generator passes if no score is beyond ±5. With about a hundred scores a sound generator fails once in ten thousand
batteries. `jax.random.normal`, the "threefry" generator, inverts the error function at 23 bits, so it never goes beyond
5.4 σ. The tail tests detect that if --numbers is large enough to expect such values.
"""

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from es_jax.core import rng

LIMIT = 5.0
CHUNK = 1 << 22
TAILS = (3.0, 4.0, 4.5, 5.0, 5.5)
LAGS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 63, 64, 127, 128, 255, 256, 576, 1024, 1536, 4096, 65536)
PAIRS = ("next member", "member one bit away", "other leaf", "next step")
MOMENTS = (0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395)  # of orders 1..12

Draw = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


def _sum(x: jax.Array) -> jax.Array:
    """A sum in short pieces, for which float32 is precise enough."""
    while x.size > 1:
        x = x.reshape(-1, 256 if x.size % 256 == 0 else x.size).sum(1)
    return x.reshape(())


def _counts(x: jax.Array, bins: int) -> jax.Array:
    place = jnp.floor(jax.scipy.special.ndtr(x) * jnp.float32(bins)).astype(jnp.int32)
    return jnp.clip(place, 0, bins - 1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _alone(draw: Draw, seed: jax.Array, leaf: jax.Array, size: int) -> dict[str, jax.Array]:
    """Sums over one chunk: moments, tails, lags and the histogram."""
    x = draw(seed, leaf, (size,))
    out = {f"moment {k}": _sum(x**k) for k in range(1, 7)}
    out |= {f"tail {t:+}": jnp.sum(x * jnp.sign(t) > abs(t)) for bound in TAILS for t in (bound, -bound)}
    square = x * x - 1
    for lag in (lag for lag in LAGS if lag < size):
        out[f"lag {lag}"] = _sum(jnp.pad(x[lag:] * x[:-lag], (0, lag)))
        out[f"lag {lag}, squares"] = _sum(jnp.pad(square[lag:] * square[:-lag], (0, lag)))
    return out | {"uniformity": jnp.bincount(_counts(x, 1024), length=1024)}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _together(draw: Draw, seeds: jax.Array, leaves: jax.Array, size: int) -> dict[str, jax.Array]:
    x, y = (draw(seeds[i], leaves[i], (size,)) for i in range(2))
    grid = _counts(x, 32) * 32 + _counts(y, 32)
    return {
        "": _sum(x * y),
        ", squares": _sum((x * x - 1) * (y * y - 1)),
        ", grid": jnp.bincount(grid, length=1024),
    }


def _partners(chunk: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The pairs of draws in one chunk: (name, two seeds, two leaves)."""
    now, after = (np.asarray(rng.member_seeds(7, step, 2, streams=1)) for step in (chunk, chunk + 1))
    seed, leaf = int(now[0]), 1_000_003 * chunk % 2**32
    bit = seed ^ (1 << chunk % 32)
    for which, seeds, leaves in (
        (PAIRS[0], (seed, (seed + 1) % 2**32), (leaf, leaf)),
        (PAIRS[1], (seed, bit), (leaf, leaf)),
        (PAIRS[2], (seed, seed), (leaf, (leaf + 1) % 2**32)),
        (PAIRS[3], (seed, int(after[0])), (leaf, leaf)),
    ):
        yield which, np.array(seeds, np.uint32), np.array(leaves, np.uint32)


def _chi2(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(stats.norm.isf(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1)))


def _tail(count: int, n: int, beyond: float) -> float:
    expected = n * stats.norm.sf(abs(beyond))
    upper, lower = stats.poisson.sf(count - 1, expected), stats.poisson.cdf(count, expected)
    return float(stats.norm.isf(upper) if upper < lower else -stats.norm.isf(lower))


def battery(draw: Draw, *, numbers: int = CHUNK, chunk: int = CHUNK) -> dict[str, float]:
    """Scores by test; for a sound generator each is N(0, 1).

    Args:
      draw: (seed uint32, leaf uint32, shape) → N(0, 1), float32; an entry of `rng.GENERATORS`.
      numbers: how many numbers are tested for themselves; each pair test draws as many again.
      chunk: numbers in one draw; a power of two.
    """
    chunks, totals = max(numbers // chunk, 1), defaultdict(float)
    for i in range(chunks):
        seed = np.uint32(np.asarray(rng.member_seeds(11, i, 1, streams=1))[0])
        leaf = np.uint32(2_654_435_761 * (i + 1) % 2**32)
        for name, value in jax.device_get(_alone(draw, seed, leaf, chunk)).items():
            totals[name] = totals[name] + np.asarray(value, np.float64)
        for which, seeds, leaves in _partners(i):
            for name, value in jax.device_get(_together(draw, seeds, leaves, chunk)).items():
                totals[which + name] = totals[which + name] + np.asarray(value, np.float64)
    first, again = (np.asarray(draw(jnp.uint32(5), jnp.uint32(6), (4096,))) for _ in range(2))
    scores = {name: _score(name, total, chunks * chunk, chunks) for name, total in totals.items()}
    return scores | {"determinism": 0.0 if np.array_equal(first, again) else float("inf")}


def _score(name: str, total: np.ndarray, n: int, chunks: int) -> float:
    kind, _, rest = name.partition(" ")
    if np.ndim(total):
        return _chi2(total)
    if kind == "tail":
        return _tail(int(total), n, float(rest))
    if kind == "moment":
        k = int(rest)
        mean, variance = MOMENTS[k - 1], MOMENTS[2 * k - 1] - MOMENTS[k - 1] ** 2
        return float((total - n * mean) / np.sqrt(n * variance))
    if kind == "lag":
        n -= chunks * int(rest.split(",")[0])
    return float(total / np.sqrt(n * (4 if name.endswith("squares") else 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", choices=rng.GENERATORS, default=rng.DEFAULT)
    parser.add_argument("--numbers", type=int, default=1 << 30)
    parser.add_argument("--json", action="store_true", help="print generator, numbers, seconds, passed and all scores")
    args = parser.parse_args()
    began = time.monotonic()
    scores = battery(rng.GENERATORS[args.generator], numbers=args.numbers)
    worst = sorted(scores, key=lambda name: -abs(scores[name]))
    passed, seconds = abs(scores[worst[0]]) < LIMIT, time.monotonic() - began
    if args.json:
        result = {"generator": args.generator, "numbers": args.numbers, "seconds": seconds, "passed": passed}
        print(json.dumps(result | {"scores": scores}))
        return
    for name in worst[:12]:
        print(f"{name:32} {scores[name]:+.2f}")
    print(f"{args.generator}: {'passed' if passed else 'FAILED'} {len(scores)} tests of {args.numbers:,} numbers")


if __name__ == "__main__":
    main()
