"""Low-rank noise: all members share one set of weights, and differ in each leaf by a product of two thin matrices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from es_jax.core import rng
from es_jax.core.low_rank import LowRank, split
from es_jax.core.names import unknown
from es_jax.core.tree import map_named
from es_jax.es.noise import GaussianNoise, PyTree, Row, _check_float, _rounded, rows_of
from es_jax.es.population import Members

VECTORS = ("gaussian", "frozen")
BLOCK = 16  # members whose outer products one pass over a leaf adds; the same on every mesh and for every leaf


@dataclasses.dataclass(frozen=True)
class LowRankNoise(GaussianNoise):
    """ε = A Bᵀ/√r for every matrix, with A [D, r] and B [F, r] of N(0, 1) (EGGROLL, arXiv 2511.16652).

    Every entry of ε has mean 0 and variance 1, entries are uncorrelated and odd moments vanish, so the closed forms of
    drift hold. A single entry is not normally distributed, but a sum over many members nearly is. A leaf [D, F] is a
    matrix; a leaf with more axes is a stack of matrices, each with its own A and B. A leaf with fewer axes is a vector.

    Args:
      generator: as in `GaussianNoise`.
      rank: r ≥ 1.
      vectors: with "gaussian" vectors get full noise; with "frozen" they get none, and their estimate is 0.
      stacked: leaves whose name starts with this prefix are stacks along their first axis: [L, D] is L vectors.

    Raises:
      ValueError: unknown `generator` or `vectors`, or a rank that is not a whole number of at least 1.

    >>> import jax.numpy as jnp
    >>> from es_jax.es.population import Population
    >>> member = Population(2, seed=0).members(0)[0]
    >>> out = LowRankNoise(rank=1).apply({"w": jnp.zeros((4, 3))}, member, sigma=1.0)
    >>> int(jnp.linalg.matrix_rank(out["w"]))
    1
    """

    _: dataclasses.KW_ONLY
    rank: int = 1
    vectors: str = "gaussian"
    stacked: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: it must be a whole number of at least 1")
        if self.vectors not in VECTORS:
            raise ValueError(unknown("vectors", self.vectors, VECTORS))

    def is_matrix(self, name: str, leaf: Any) -> bool:
        """Whether the leaf is a matrix or a stack of them."""
        return len(leaf.shape) >= (3 if self.stacked and name.startswith(self.stacked) else 2)

    def perturbs(self, name: str, leaf: Any) -> bool:
        return self.vectors != "frozen" or self.is_matrix(name, leaf)

    def factors(
        self, seed: Array, name: str, shape: tuple[int, ...], row: Row | None = None
    ) -> tuple[Float[Array, "*n D r"], Float[Array, "*n F r"]]:
        """A/√r and B for a matrix leaf of that shape and one member, in float32.

        Both are made once and kept, so that they are not drawn again for every entry of their product.
        """
        part, whole = rows_of(shape, row)
        stack, (rows, columns) = whole[:-2], shape[-2:]
        draw = functools.partial(rng.normal, seed, generator=self.generator, rows=part)
        a, b = draw(f"{name} A", (*stack, rows, self.rank)), draw(f"{name} B", (*stack, columns, self.rank))
        return lax.optimization_barrier((_rounded(a * jnp.float32(self.rank**-0.5)) if self.rank > 1 else a, b))

    def _sample(self, seed: Array, name: str, leaf: Any, row: Row | None = None) -> Float[Array, "..."]:
        if not self.is_matrix(name, leaf):
            return super()._sample(seed, name, leaf, row) if self.vectors == "gaussian" else jnp.zeros(leaf.shape)
        a, b = self.factors(seed, name, leaf.shape, row)
        return _add_outer(None, a, b).astype(self._arithmetic(leaf))

    def members_of(self, params: PyTree, members: Members, *, sigma: float | Array, dtype: Any = None) -> PyTree:
        """All members at once: a `LowRank` (base, a [N, …], b [N, …]) for every matrix; the base is not copied.

        A vector is [N, …], each member's own. σ and the sign are in b.

        Args:
          params, sigma: as in `apply`.
          members: N of them.
          dtype: dtype of bases and vectors; each leaf's own by default. Pairs are float32.
        """
        pairs = jax.vmap(lambda member: self.pair(params, member, sigma=sigma, dtype=dtype))(members)

        def member(name, leaf, pair):
            if not self.is_matrix(name, leaf):
                return pair
            base, rest = split(leaf, dtype or leaf.dtype)
            return LowRank(base, *pair, rest)

        return map_named(member, params, pairs)

    def pair(self, params: PyTree, member: Members, *, sigma: float | Array, dtype: Any = None) -> PyTree:
        """What one member adds: (a, b) for every matrix, from the leaf's shape alone; and its vectors."""

        def pair(name, leaf):
            _check_float(name, leaf)
            kind = dtype or leaf.dtype
            if not self.is_matrix(name, leaf):
                return self.apply({name: leaf}, member, sigma=sigma, dtype=kind)[name]
            a, b = self.factors(member.seed, name, leaf.shape)
            return a, jnp.float32(sigma) * member.sign * b

        return map_named(pair, params)

    def estimate(
        self,
        params: PyTree,
        members: Members,
        weights: Float[Array | np.ndarray, " n"],
        *,
        specs: PyTree = None,
    ) -> PyTree:
        """−(1/N) Σ wₙ signₙ Aₙ Bₙᵀ/√r, as in `GaussianNoise.estimate`; the members' dense matrices are never formed.

        Outer products are added in member order, each rounded separately; a matrix product would add them in an order
        that depends on the shape of a device's slice.

        Args:
          params, members, weights: as in `GaussianNoise.estimate`.
          specs: inside a `shard_map`, the sharding of each leaf (a tree of PartitionSpecs); a device then returns its
            slice. It draws whole A and B, which are small, and sends nothing, whereas a partitioner may draw and send
            parts.
        """
        seeds, signed = self.summands(members, weights)
        first = (len(seeds) - 1) % BLOCK + 1  # members in the first, shorter pass, which avoids initial zeros
        vectors = super().estimate

        def matrix(name, leaf, spec):
            def add(start, count, total):
                seed, weight = (lax.dynamic_slice_in_dim(x, start, count) for x in (seeds, signed))
                a, b = jax.vmap(lambda one: self.factors(one, name, leaf.shape))(seed)
                a, b = _slice(a, (None, *spec[:-1])), _slice(b, (None, *spec[:-2], spec[-1]))
                a = lax.optimization_barrier(_rounded(a * weight.reshape(-1, *(1,) * (a.ndim - 1))))
                for i in range(count):
                    total = _add_outer(total, a[i], b[i])
                return total

            total, passes = add(0, first, None), (len(seeds) - first) // BLOCK
            if passes:
                total = lax.fori_loop(0, passes, lambda k, t: add(first + k * BLOCK, BLOCK, t), total)
            return total.astype(self._arithmetic(leaf))

        def one(name, leaf, spec=()):
            _check_float(name, leaf)
            spec = (*spec, *(None,) * (leaf.ndim - len(spec)))
            if self.is_matrix(name, leaf):
                return matrix(name, leaf, spec)
            if self.vectors == "frozen":
                return _slice(jnp.zeros(leaf.shape, self._arithmetic(leaf)), spec)
            return _slice(vectors({name: leaf}, members, weights)[name], spec)

        return map_named(one, params) if specs is None else map_named(one, params, specs)


def _slice(x: Array, spec: tuple[str | None, ...]) -> Array:
    """A device's shard of an array with that sharding; inside a `shard_map`."""
    for axis, entry in enumerate(spec):
        if entry is not None:
            size = x.shape[axis] // lax.axis_size(entry)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(entry) * size, size, axis)
    return x


def _add_outer(total: Array | None, a: Array, b: Array) -> Array:
    """total + a bᵀ, column by column, each product rounded before it is added."""
    for k in range(a.shape[-1]):
        product = _rounded(a[..., :, None, k] * b[..., None, :, k])
        total = product if total is None else total + product
    assert total is not None
    return total
