"""The one place where random keys are made.

Every draw of a run is a pure function of (run seed, purpose, step, member, leaf, position). Nothing is split and
carried along, so resuming and replaying need no random state, and the bits do not depend on the device mesh.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt32

_MEMBERS, _SAMPLING = 1, 2  # what a key is for: streams that never meet
MAX_SEED = 2**32 - 1


def check_seed(seed: int) -> int:
    """The seed itself, if it is a whole number in 0..2**32 - 1; otherwise a ValueError."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed!r}: it must be a whole number from 0 to {MAX_SEED}")
    return int(seed)


def key(seed: int | Array) -> PRNGKeyArray:
    """A threefry key, whatever `jax_default_prng_impl` says: replay must not depend on a global flag."""
    return jax.random.key(seed, impl="threefry2x32")


def member_seeds(seed: int, step: int | Array, n: int) -> UInt32[Array, "n"]:
    """One 32-bit seed for each of the step's `n` independent noise vectors."""
    stream = jax.random.fold_in(jax.random.fold_in(key(check_seed(seed)), _MEMBERS), step)
    return jax.random.bits(stream, (n,), jnp.uint32)


def sampling_key(seed: int, step: int | Array) -> PRNGKeyArray:
    """The key of a step's sampled tokens."""
    return jax.random.fold_in(jax.random.fold_in(key(check_seed(seed)), _SAMPLING), step)


def leaf_key(seed: UInt32[Array, ""], name: str) -> PRNGKeyArray:
    """The key of one leaf of one member: the member's seed folded with a stable hash of the leaf's name."""
    return jax.random.fold_in(key(seed), np.uint32(zlib.crc32(name.encode())))


def random_rewards(seed: int, step: int, n: int) -> np.ndarray:
    """Rewards that say nothing about the members, N(0, 1): the control of an experiment."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), 2**32 + step])).standard_normal(n)


def row_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which `n` training rows are visited in one pass over them; host side, exact on every machine."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), epoch])).permutation(n)
