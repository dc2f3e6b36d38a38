"""The one place where random keys are made.

Every draw of a run is a pure function of (run seed, purpose, step, member, leaf, position). Nothing is split and
carried along, so resuming and replaying need no random state, and the bits do not depend on the device mesh.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray, UInt32

from es_jax.core.threefry_normal import box_muller, counters, positions, threefry

# What a key is for: streams that never meet. `jax.random.fold_in(key, i)` is `jax.random.split(key, n)[i]`, so a
# purpose is a number that no split reaches: one into n ≤ 4·10⁹ keys, 32 GB of them, has other keys for certain, since
# threefry under one key is one-to-one. Version 1 is of runs from before: what splits the key of their seed, as
# `Transformer.init` does, has their members' keys. Version 3 draws what 2 draws; its estimate weighs a pair's noise
# with the same bits on CPUs and GPUs (`GaussianNoise.pairs_scaled_first`).
_PURPOSES = {1: {"members": 1, "sampling": 2}, 2: {"members": 0xF000_0001, "sampling": 0xF000_0002}}
_PURPOSES[3] = _PURPOSES[2]
STREAMS = 3  # the purposes of new runs
MAX_SEED = 2**32 - 1
Rows = tuple[Array | int, int]  # (first, count): of an array, so many of its rows


def check_seed(seed: int) -> int:
    """The seed itself. Raises ValueError unless it is a whole number in 0..2**32 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed!r}: it must be a whole number from 0 to {MAX_SEED}")
    return int(seed)


def key(seed: int | Array) -> PRNGKeyArray:
    """A threefry key, whatever `jax_default_prng_impl` says: replay must not depend on a global flag."""
    return jax.random.key(seed, impl="threefry2x32")


def check_streams(streams: int) -> int:
    """The version of the streams itself. Raises ValueError for one that is not known."""
    if streams not in _PURPOSES:
        raise ValueError(
            f"streams is {streams!r}: known are {', '.join(map(str, _PURPOSES))}; a newer es_jax has others"
        )
    return streams


def member_seeds(seed: int, step: int | Array, n: int, *, streams: int = STREAMS) -> UInt32[Array, " n"]:
    """One 32-bit seed for each of the step's `n` independent noise vectors."""
    return jax.random.bits(_step_key(seed, "members", step, streams), (n,), jnp.uint32)


def sampling_key(seed: int, step: int | Array, *, streams: int = STREAMS) -> PRNGKeyArray:
    """The key of a step's sampled tokens. Steps of training begin at 1; 0 is of what is sampled to measure KL."""
    return _step_key(seed, "sampling", step, streams)


def _step_key(seed: int, purpose: str, step: int | Array, streams: int) -> PRNGKeyArray:
    root = jax.random.fold_in(key(check_seed(seed)), np.uint32(_PURPOSES[check_streams(streams)][purpose]))
    return jax.random.fold_in(root, step)


def normal(
    seed: UInt32[Array, ""], name: str, shape: tuple[int, ...], *, generator: str, rows: Rows | None = None
) -> Float32[Array, "..."]:
    """N(0, 1) for one leaf of one member: a function of its seed, the leaf's name and the position in the leaf.

    A stable hash of the name keys the draw together with the seed. `generator` is a name of `GENERATORS`. With `rows`
    (first, count), those of so many rows alone, [count, …].
    """
    return GENERATORS[generator](seed, np.uint32(zlib.crc32(name.encode())), shape, rows)


def normal_at(
    seed: UInt32[Array, ""], name: str, shape: tuple[int, ...], index: Sequence[UInt32[Array, "..."]]
) -> Float32[Array, "..."]:
    """The numbers that `normal` of generator "threefry13" has at one index along each axis; in a kernel of Pallas."""
    words = threefry((seed, jnp.uint32(zlib.crc32(name.encode()))), counters(shape, index))
    return box_muller(*words, in_kernel=True)


def _threefry13(seed: Array, leaf: Array | np.uint32, shape: tuple[int, ...], rows: Rows | None = None) -> Array:
    return box_muller(*threefry((seed, jnp.uint32(leaf)), positions(shape, rows)))


def _threefry(seed: Array, leaf: Array | np.uint32, shape: tuple[int, ...], rows: Rows | None = None) -> Array:
    whole = jax.random.normal(jax.random.fold_in(key(seed), leaf), shape, jnp.float32)
    return whole if rows is None else jax.lax.dynamic_slice_in_dim(whole, *rows)


# How the noise of members is drawn. "threefry13" is fused into what uses it (see `threefry_normal`); "threefry" is
# jax.random.normal, 20 rounds and the inverse error function of 23 bits, some ten times the cost on CPU.
GENERATORS = {"threefry13": _threefry13, "threefry": _threefry}
DEFAULT = "threefry13"


def random_rewards(seed: int, step: int, n: int) -> np.ndarray:
    """Rewards that say nothing about the members, N(0, 1): the control of an experiment."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), 2**32 + step])).standard_normal(n)


def deal_order(seed: int, step: int, n: int) -> np.ndarray:
    """The order in which a step's `n` prompts are dealt to its members."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), 2**33 + step])).permutation(n)


def row_order(seed: int, epoch: int, n: int) -> list[int]:
    """The order in which `n` training rows are visited in one pass over them; host side, exact on every machine."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), epoch])).permutation(n).tolist()
