"""The square root of the noise is the one that IEEE 754 asks for, wherever a device's own root is one step off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from es_jax.core import threefry_normal
from es_jax.core.mesh import GROUPS, make_mesh

ONE = 0x3F800000  # bits of 1.0, and from there on all mantissas of 1..2 and of 2..4: the roots of all others are scaled


@jax.jit
def steps_off(x, root, off):
    """How many roots come out other than `root`, from a start that many steps away."""
    start = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(root, jnp.int32) + off, jnp.float32)
    return (threefry_normal._nearest_root(x, start) != root).sum()


def ieee_root(x):
    return np.sqrt(x.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("octave", [0, 1])
def test_every_root_is_rounded_to_nearest_from_a_start_one_step_off(octave):
    x = (np.arange(2**23, dtype=np.int32) + np.int32(ONE + octave * 2**23)).view(np.float32)
    root = ieee_root(x)
    assert all(steps_off(x, root, off) == 0 for off in (-1, 0, 1))


def test_roots_of_all_sizes():
    bits = np.concatenate([np.arange(0x00800000, 0x7F800000, 9973), np.arange(0x00800000, 0x7F800000, 2**23)])
    x = bits.astype(np.int32).view(np.float32)
    assert all(steps_off(x, ieee_root(x), off) == 0 for off in (-1, 0, 1))


def test_the_root_of_zero_is_zero():
    assert threefry_normal._exact_sqrt(jnp.zeros(3)).tolist() == [0, 0, 0]


def numbers(words):
    return threefry_normal.box_muller(words, words * jnp.uint32(0x9E3779B9))


@pytest.fixture
def words():
    return jnp.arange(2**12, dtype=jnp.uint32) * jnp.uint32(0x000FFFFF) + jnp.uint32(2**32 - 2**12)


def test_the_root_of_other_backends_gives_the_same_numbers(words, monkeypatch):
    expected = jax.jit(numbers)(words)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, *, cpu, default: default(x))
    assert np.array_equal(jax.jit(lambda w: numbers(w))(words), expected)


def test_one_root_in_every_transformation(words):
    expected = jax.jit(numbers)(words)
    rows = words.reshape(8, -1)
    part = PartitionSpec(GROUPS)
    sharded = jax.shard_map(numbers, mesh=make_mesh(8, 1), in_specs=part, out_specs=part)

    def loop(rows):
        return jax.lax.fori_loop(0, 8, lambda i, out: out.at[i].set(numbers(rows[i])), jnp.zeros(rows.shape))

    for got in (numbers(words), jax.jit(jax.vmap(numbers))(rows), jax.jit(loop)(rows), jax.jit(sharded)(words)):
        assert np.array_equal(np.ravel(got), expected)


@functools.cache
def lowered(platform):
    return (
        jax.jit(numbers).trace(jax.ShapeDtypeStruct((8,), jnp.uint32)).lower(lowering_platforms=(platform,)).as_text()
    )


def test_only_a_cpu_keeps_its_root_as_it_is():
    assert "stablehlo.sqrt" in lowered("cpu") and "stablehlo.shift_left" not in lowered("cpu")
    for platform in ("cuda", "rocm", "tpu"):
        assert "stablehlo.sqrt" in lowered(platform) and "stablehlo.shift_left" in lowered(platform)
