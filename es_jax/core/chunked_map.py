"""Work on positions in blocks, so that what is large for each of them is held for one block at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

HELD = 2**25  # numbers held at once: 128 MiB of float32


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def block_length(numbers: int, *, multiple: int = 1) -> int:
    """How many positions, each of so many numbers, are in a block of about 128 MiB of float32; at least `multiple`."""
    return max(HELD // numbers // multiple, 1) * multiple


def in_blocks(function: Callable, *arrays: Array, block: int) -> Any:
    """`function` of arrays [B, L, …], called on equal blocks of positions [B, b, …], b ≤ block, one after another.

    What it makes inside is in memory for one block, forwards and backwards. It returns a tree of arrays [B, b, …].

    >>> in_blocks(lambda x: 2 * x, jnp.arange(5)[None], block=2).tolist()
    [[0, 2, 4, 6, 8]]
    """
    length = arrays[0].shape[1]
    count = ceil_div(length, block)
    if count == 1:
        return function(*arrays)
    block = ceil_div(length, count)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, count * block - length if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * block, *x.shape[3:])[:, :length]

    out = jax.lax.map(lambda xs: jax.checkpoint(function)(*xs), tuple(map(cut, arrays)))
    return jax.tree.map(join, out)
