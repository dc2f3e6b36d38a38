"""The only place where random keys are made.

Every random number of a run is a pure function of (run seed, purpose, step, member, leaf, position). No key is split
and carried along, so resuming and replaying need no random state, and the bits do not depend on the device mesh.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, PRNGKeyArray, UInt32

from es_jax.core.threefry_normal import box_muller, counters, positions, threefry

# The purposes of keys: streams that never coincide. `jax.random.fold_in(key, i)` is `jax.random.split(key, n)[i]`, so a
# purpose is a number that no split reaches: a split into n ≤ 4·10⁹ keys (32 GB) certainly gives other keys, since
# threefry under one key is one-to-one. Version 1 is that of older runs: code that splits the key of their seed, as
# `Transformer.init` does, gets their members' keys. Version 3 draws the same numbers as version 2; its estimate weights
# a pair's noise with the same bits on CPUs and GPUs (`GaussianNoise.pairs_scaled_first`).
_PURPOSES = {1: {"members": 1, "sampling": 2}, 2: {"members": 0xF000_0001, "sampling": 0xF000_0002}}
_PURPOSES[3] = _PURPOSES[2]
STREAMS = 3  # the purposes of new runs
_EVALUATION = 0xF000_0003  # a purpose that no run uses
MAX_SEED = 2**32 - 1
Rows = tuple[Array | int, int]  # (first, count): that many rows of an array


def check_seed(seed: int) -> int:
    """Returns the seed. Raises ValueError unless it is a whole number in 0..2**32 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed!r}: it must be a whole number from 0 to {MAX_SEED}")
    return int(seed)


def key(seed: int | Array) -> PRNGKeyArray:
    """A threefry key, independent of `jax_default_prng_impl`: replay must not depend on a global flag."""
    return jax.random.key(seed, impl="threefry2x32")


def check_streams(streams: int) -> int:
    """Returns the version of the streams. Raises ValueError if it is not known."""
    if streams not in _PURPOSES:
        raise ValueError(
            f"streams is {streams!r}: this version knows {', '.join(map(str, _PURPOSES))}; use a newer es_jax for "
            "others"
        )
    return streams


def member_seeds(seed: int, step: int | Array, n: int, *, streams: int = STREAMS) -> UInt32[Array, " n"]:
    """One 32-bit seed for each of the step's `n` independent noise vectors."""
    return jax.random.bits(_step_key(seed, "members", step, streams), (n,), jnp.uint32)


def sampling_key(seed: int, step: int | Array, *, streams: int = STREAMS) -> PRNGKeyArray:
    """The key for sampling a step's tokens. Training steps begin at 1; 0 is for samples to measure KL."""
    return _step_key(seed, "sampling", step, streams)


def row_keys(seed: int, step: int, n: int, *, streams: int = STREAMS) -> np.ndarray:
    """The keys of a step's `n` prompts, uint32 [n, 2], for `wrapped`: `fold_in(sampling_key, row)`. All members of a
    step share them, so that two members' completions differ only because of their weights."""
    key = sampling_key(seed, step, streams=streams)
    return np.asarray(jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(n, dtype=np.uint32))))


def evaluation_keys(seed: int, rows: int, samples: int) -> np.ndarray:
    """The keys of several samples of each held-out row, uint32 [samples, rows, 2], for `wrapped`.

    A sample's key is a function of (seed, row, sample). It is the same at every step of every run, and does not depend
    on the numbers of rows and samples.
    """
    root = jax.random.fold_in(key(check_seed(seed)), np.uint32(_EVALUATION))
    both = jax.vmap(jax.vmap(lambda row, sample: jax.random.fold_in(jax.random.fold_in(root, row), sample), (0, None)))
    index = np.arange(rows, dtype=np.uint32), np.arange(samples, dtype=np.uint32)
    return np.asarray(jax.random.key_data(both(np.broadcast_to(index[0], (samples, rows)), index[1])))


def wrapped(data: UInt32[Array, "*n 2"]) -> Key[Array, "*n"]:
    """Keys made from their numbers, which are easier to place on devices."""
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def _step_key(seed: int, purpose: str, step: int | Array, streams: int) -> PRNGKeyArray:
    root = jax.random.fold_in(key(check_seed(seed)), np.uint32(_PURPOSES[check_streams(streams)][purpose]))
    return jax.random.fold_in(root, step)


def normal(
    seed: UInt32[Array, ""], name: str, shape: tuple[int, ...], *, generator: str, rows: Rows | None = None
) -> Float32[Array, "..."]:
    """N(0, 1) for one leaf of one member: a function of its seed, the leaf's name and the position in the leaf.

    A stable hash of the name keys the draw together with the seed. `generator` is a name of `GENERATORS`. With `rows`
    (first, count) it draws only those rows, [count, …].
    """
    return GENERATORS[generator](seed, np.uint32(zlib.crc32(name.encode())), shape, rows)


def normal_at(
    seed: UInt32[Array, ""], name: str, shape: tuple[int, ...], index: Sequence[UInt32[Array, "..."]]
) -> Float32[Array, "..."]:
    """The number that `normal` with generator "threefry13" has at one index along each axis; inside a Pallas kernel."""
    words = threefry((seed, jnp.uint32(zlib.crc32(name.encode()))), counters(shape, index))
    return box_muller(*words, in_kernel=True)


def _threefry13(seed: Array, leaf: Array | np.uint32, shape: tuple[int, ...], rows: Rows | None = None) -> Array:
    return box_muller(*threefry((seed, jnp.uint32(leaf)), positions(shape, rows)))


def _threefry(seed: Array, leaf: Array | np.uint32, shape: tuple[int, ...], rows: Rows | None = None) -> Array:
    whole = jax.random.normal(jax.random.fold_in(key(seed), leaf), shape, jnp.float32)
    return whole if rows is None else jax.lax.dynamic_slice_in_dim(whole, *rows)


# How the noise of members is drawn. "threefry13" is fused into the code that uses it (see `threefry_normal`);
# "threefry" is jax.random.normal, with 20 rounds and an inverse error function on 23 bits, which costs about ten times
# as much on CPU.
GENERATORS = {"threefry13": _threefry13, "threefry": _threefry}
DEFAULT = "threefry13"


def random_rewards(seed: int, step: int, n: int) -> np.ndarray:
    """Rewards N(0, 1) that do not depend on the members: the control of an experiment."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), 2**32 + step])).standard_normal(n)


def deal_order(seed: int, step: int, n: int) -> np.ndarray:
    """The order in which a step deals its `n` prompts to members."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), 2**33 + step])).permutation(n)


def row_order(seed: int, epoch: int, n: int) -> list[int]:
    """The order in which one pass visits `n` training rows; computed on the host, equal on every machine."""
    return np.random.Generator(np.random.Philox(key=[check_seed(seed), epoch])).permutation(n).tolist()
