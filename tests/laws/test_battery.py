"""The battery passes the generators of the table and catches broken ones; what 32 bits reach is checked exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.battery import LIMIT, battery
from es_jax.core import rng, threefry_normal

SIZE = dict(numbers=1 << 18, chunk=1 << 17)


def failing(draw):
    return {name for name, score in battery(draw, **SIZE).items() if not abs(score) < LIMIT}


@pytest.mark.parametrize("generator", rng.GENERATORS)
def test_generators_pass(generator):
    assert not failing(rng.GENERATORS[generator])


def good(seed, leaf, shape):
    return rng.GENERATORS["threefry13"](seed, leaf, shape)


def of_twelve_uniforms(seed, leaf, shape):
    words = threefry_normal.threefry((seed, jnp.uint32(leaf)), threefry_normal.positions((12, *shape)))[0]
    return (words.astype(jnp.float32) * jnp.float32(2**-32)).sum(0) - 6


BROKEN = {
    "moment 6": of_twelve_uniforms,
    "uniformity": lambda seed, leaf, shape: jnp.round(good(seed, leaf, shape) * 64) / 64,
    "tail +4.5": lambda seed, leaf, shape: jnp.where((z := good(seed, leaf, shape)) > 3.8, 1.2 * z, z),
    "lag 4096": lambda seed, leaf, shape: jnp.tile(good(seed, leaf, (4096,)), shape[0] // 4096),
    "next member, squares": lambda seed, leaf, shape: (
        jnp.abs(good(seed & ~jnp.uint32(1), leaf, shape)) * jnp.sign(good(seed, leaf, shape))
    ),
    "member one bit away": lambda seed, leaf, shape: good(seed & ~jnp.uint32(255), leaf, shape),
    "other leaf": lambda seed, leaf, shape: good(seed, jnp.uint32(0), shape),
}


@pytest.mark.parametrize("test", BROKEN)
def test_broken_generators_are_caught(test):
    assert test in failing(BROKEN[test])


def test_words_are_the_published_ones():
    """The known answers that come with Random123, for 20 rounds and for 13."""
    ones, zeros, pi = 0xFFFFFFFF, 0, (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3)
    cases = [
        ((zeros,) * 4, 20, (0x6B200159, 0x99BA4EFE)),
        ((ones,) * 4, 20, (0x1CB996FC, 0xBB002BE7)),
        (pi, 20, (0xC4923A9C, 0x483DF7A0)),
        ((zeros,) * 4, 13, (0x9D1C5EC6, 0x8BD50731)),
    ]
    for words, rounds, expected in cases:
        a, b, c, d = (jnp.uint32(word) for word in words)
        assert tuple(int(word) for word in threefry_normal.threefry((a, b), (c, d), rounds=rounds)) == expected


def test_twenty_rounds_are_those_of_jax():
    bits = jax.random.bits(jax.random.wrap_key_data(jnp.array([3, 4], jnp.uint32), impl="threefry2x32"), (100,))
    x, y = threefry_normal.threefry((jnp.uint32(3), jnp.uint32(4)), threefry_normal.positions((100,)), rounds=20)
    assert np.array_equal(bits, x ^ y)


def test_the_radius_has_the_tail_of_its_32_bits():
    """P(r > x) = exp(−x²/2), to 6.6: the radius falls with its word, so the number of words beyond x counts it."""
    for x in (0.5, 1.0, 3.0, 4.0, 5.0, 5.5, 6.0, 6.6):
        expected = 2**32 * math.exp(-x * x / 2)
        near = np.arange(max(int(expected * (1 - 1e-4)) - 3, 0), int(expected * (1 + 1e-4)) + 4)[:100_000_000]
        step = max(len(near) // 100_000, 1)
        r = np.sqrt(
            np.asarray(threefry_normal._minus_two_log(jnp.asarray(near[::step], jnp.uint32))) / threefry_normal._SCALE
        )
        assert (np.diff(r) <= 2e-6).all()
        found = near[::step][np.searchsorted(-r, -x)]
        assert abs(found - expected) <= step + 1 + 2e-5 * expected


def test_the_largest_and_smallest_words_are_finite():
    words = jnp.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    z = threefry_normal.box_muller(words[:, None], words[None, :])
    assert np.isfinite(z).all() and 6.7 < np.abs(z).max() < 6.8


def test_positions_count_past_32_bits():
    hi, lo = jax.eval_shape(lambda: threefry_normal.positions((70_000, 50_000, 3)))
    assert hi.shape == lo.shape == (70_000, 50_000, 3)
    with pytest.raises(ValueError, match="split the leaf"):
        threefry_normal.positions((2**33,))
    _, flat = threefry_normal.positions((4, 5, 6))
    assert np.array_equal(flat.ravel(), np.arange(120))
