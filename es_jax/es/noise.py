"""Noise on any pytree: perturb a model by a member's seed, and estimate the gradient from all members' seeds.

Noise is never stored. A number of ε is a function of (member seed, leaf name, position in the leaf), so every device
makes just the slice it holds, and the estimate needs no communication and has the same bits on every mesh.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from es_jax.core import rng, threefry_normal
from es_jax.core.names import unknown
from es_jax.core.tree import map_named
from es_jax.es.population import Members

PyTree = Any
Row = tuple[Array | int, int]  # (i, n): a leaf [k, …] holds the k rows from row i on of a leaf [n, …]
_TOGETHER = 6  # members that one pass over a leaf adds: more touch the sum less often, but compile longer


def _check_float(name: str, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"leaf {name!r} has dtype {leaf.dtype}, but noise is defined only for floating-point leaves: remove the "
            "others from the tree before perturbing it"
        )


def rows_of(shape: tuple[int, ...], row: Row | None) -> tuple[rng.Rows | None, tuple[int, ...]]:
    """For a leaf of that shape: which rows it holds, and of what whole shape."""
    return (None, shape) if row is None else ((row[0], shape[0]), (row[1], *shape[1:]))


def _rounded(product: Array) -> Array:
    return threefry_normal.rounded(product) if product.dtype == jnp.float32 else product


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """ε ~ N(0, I), independent between leaves, members and steps.

    The arithmetic is in float32 whatever the leaf's dtype (float64 for float64 leaves): θ + σε is rounded once, to the
    dtype asked for, and the estimate is returned unrounded.

    Args:
      generator: what draws ε, a name of `es_jax.core.rng.GENERATORS`. Another generator is another run.
      pairs_scaled_first: how antithetic pairs are weighed in runs of the streams 1 and 2: each of the two weights is
        multiplied by −1/N, then they are added. CPUs fuse that product and sum, and GPUs do not, so bits differ.

    Raises:
      ValueError: an unknown generator.

    >>> import jax.numpy as jnp
    >>> from es_jax.es.population import Population
    >>> members = Population(2, seed=0, antithetic=True).members(0)
    >>> params, noise = {"w": jnp.zeros(3)}, GaussianNoise()
    >>> up, down = (noise.apply(params, member, sigma=0.1) for member in members)
    >>> float(jnp.abs(up["w"] + down["w"]).max())
    0.0
    """

    generator: str = rng.DEFAULT
    pairs_scaled_first: bool = False

    def __post_init__(self):
        if self.generator not in rng.GENERATORS:
            raise ValueError(unknown("generator", self.generator, rng.GENERATORS))

    def perturbs(self, name: str, leaf: Any) -> bool:
        """Whether a leaf gets noise."""
        return True

    @property
    def layers_alone(self) -> bool:
        """Whether the noise of a single layer can be drawn separately, at that layer's cost and with the same bits."""
        return self.generator == "threefry13"

    @property
    def elementwise(self) -> bool:
        """Whether every number of ε can be made alone, of a seed, the leaf's name and shape, and an index."""
        return type(self) is GaussianNoise and self.generator == "threefry13"

    def apply_at(
        self, name: str, shape: tuple[int, ...], index: Sequence[Array], seed: Array, scale: Array, leaf: Array
    ) -> Float[Array, "..."]:
        """`apply` to the elements with that index, in a kernel of Pallas, not cast yet; `scale`: sign·σ."""
        return leaf.astype(jnp.float32) + _rounded(scale * rng.normal_at(seed, name, shape, index))

    def estimate_at(
        self, name: str, shape: tuple[int, ...], index: Sequence[Array], seeds: Any, signed: Any
    ) -> Float[Array, "..."]:
        """`estimate` of the elements with that index, in a kernel of Pallas; `seeds` and `signed`: of `summands`."""

        def add(i: Array, total: Array) -> Array:
            return total + _rounded(signed[i] * rng.normal_at(seeds[i], name, shape, index))

        return jax.lax.fori_loop(0, len(seeds), add, jnp.zeros(index[-1].shape, jnp.float32))

    def _sample(self, seed: Array, name: str, leaf: Any, row: Row | None = None) -> Float[Array, "..."]:
        """ε of one leaf for one member, in the dtype of the arithmetic."""
        rows, shape = rows_of(leaf.shape, row)
        noise = rng.normal(seed, name, shape, generator=self.generator, rows=rows)
        return noise.astype(self._arithmetic(leaf))

    def _arithmetic(self, leaf: Any) -> jnp.dtype:
        return jnp.dtype(jnp.float64) if leaf.dtype == jnp.float64 else jnp.dtype(jnp.float32)

    def apply(
        self, params: PyTree, member: Members, *, sigma: float | Array, dtype: Any = None, row: Row | None = None
    ) -> PyTree:
        """The perturbed model: cast(θ + sign·σ·ε).

        Args:
          params: any pytree of floating-point arrays.
          member: one member (`members[i]`, or a slot of a vmap).
          sigma: σ > 0.
          dtype: dtype of the result's leaves; each leaf's own by default.
          row: (i, n) where every leaf [k, …] is k rows, from row i on, of the leaf [n, …] that is perturbed, which need
            not be there.

        Raises:
          ValueError: σ ≤ 0.  TypeError: a leaf that is not floating point, which is named.
        """
        if isinstance(sigma, int | float) and not sigma > 0:
            raise ValueError(f"sigma is {sigma}: the noise scale must be above 0 (the papers use 1e-3)")

        def perturb(name, leaf):
            _check_float(name, leaf)
            kind = self._arithmetic(leaf)
            scale = jnp.asarray(sigma, kind) * member.sign.astype(kind)
            step = _rounded(scale * self._sample(member.seed, name, leaf, row))
            return (leaf.astype(kind) + step).astype(dtype or leaf.dtype)

        return map_named(perturb, params)

    def estimate(self, params: PyTree, members: Members, weights: Float[Array | np.ndarray, " n"]) -> PyTree:
        """The gradient of minus the mean reward, −(1/N) Σ wₙ signₙ εₙ, so that any optax optimizer descends.

        The papers fold 1/σ into the learning rate, and so does this. Noise is made again from the seeds, each number
        once and added at once, in member order (a pair's noise once, weighted z⁺ − z⁻): memory does not grow with N.

        Args:
          params: the pytree that was perturbed; only its shapes and dtypes are read.
          members: the N members of the step.
          weights: [N] shaped rewards, such as `z_score(rewards)`.

        Returns:
          A tree like params, float32 (float64 for float64 leaves).

        Raises:
          ValueError: weights that are not one number a member.
        """
        seeds, signed = self.summands(members, weights)
        together = min(_TOGETHER, len(seeds))
        passes, rest = divmod(len(seeds) - 1, together)
        first = rest + 1  # members in the first, shorter pass; all others have one length

        def leaf_estimate(name, leaf):
            _check_float(name, leaf)
            kind = self._arithmetic(leaf)

            def add(start, count, total):
                for i in range(count):
                    weight = signed[start + i].astype(kind)
                    total = total + _rounded(weight * self._sample(seeds[start + i], name, leaf))
                return total

            total = add(0, first, jnp.zeros(leaf.shape, kind))
            if passes:
                total = jax.lax.fori_loop(0, passes, lambda k, t: add(first + k * together, together, t), total)
            return total

        return map_named(leaf_estimate, params)

    def summands(self, members: Members, weights: Float[Array | np.ndarray, " n"]) -> tuple[Array, Array]:
        """The seeds, and what the noise of each is added with: −wₙ signₙ / N, of a pair z⁺ − z⁻ alike."""
        weights = jnp.asarray(weights)
        if weights.shape != (len(members),):
            raise ValueError(f"weights have shape {weights.shape} for {len(members)} members: give one weight a member")
        signed, seeds, share = weights.astype(jnp.float32) * members.sign, members.seed, jnp.float32(-1 / len(members))
        if members.paired and self.pairs_scaled_first:
            signed = signed * share
            return seeds[::2], signed[::2] + signed[1::2]
        if members.paired:  # signs are ±1, so nothing is rounded before the sum
            signed, seeds = signed[::2] + signed[1::2], seeds[::2]
        return seeds, signed * share


@dataclasses.dataclass(frozen=True)
class SharedSeedNoise(GaussianNoise):
    """The published code's noise: leaves of one shape share it, and all arithmetic is in the leaf's own dtype.

    With float16 parameters it reproduces the published norms, rounding included; that is its use. The shared noise
    ties equal-shaped layers together, and 16-bit sums lose small updates, so it is not a way to train.

    Args:
      stacked: leaves whose name starts with this prefix hold one parameter per index of their first axis (layers
        stacked for a scan); the shape that counts, and the noise, is that of one of them.

    >>> import jax.numpy as jnp
    >>> from es_jax.es.population import Population
    >>> member = Population(2, seed=0).members(0)[0]
    >>> out = SharedSeedNoise().apply({"a": jnp.zeros(3), "b": jnp.zeros(3)}, member, sigma=1.0)
    >>> bool((out["a"] == out["b"]).all())
    True
    """

    stacked: str | None = None

    def _arithmetic(self, leaf: Any) -> jnp.dtype:
        return leaf.dtype

    def _sample(self, seed: Array, name: str, leaf: Any, row: Row | None = None) -> Float[Array, "..."]:
        if self.stacked and name.startswith(self.stacked):
            rows, shape = None, leaf.shape[1:]
        else:  # the whole leaf is one parameter
            rows, shape = rows_of(leaf.shape, row)
        eps = rng.normal(seed, "x".join(map(str, shape)), shape, generator=self.generator, rows=rows)
        return jnp.broadcast_to(eps.astype(leaf.dtype), leaf.shape)


NOISES = {"gaussian": GaussianNoise, "shared_seed": SharedSeedNoise}
