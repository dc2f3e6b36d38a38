"""Noise on any pytree: perturb a model by one member's seed, and estimate the gradient from all members' seeds.

Noise is never stored. Each number of ε is a function of the member's seed, the leaf's name and the position in the
leaf. So every device draws only the noise of its own slice. The estimate needs no communication and has the same bits
on every mesh.
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
    """Independent normal noise: ε ~ N(0, I) for every leaf, member and step.

    `apply` perturbs a model, and `estimate` adds up the noise of all members as a gradient. Both compute in float32 (in
    float64 for float64 leaves), whatever dtype a leaf has. θ + σε is rounded once, to the dtype of the result. The
    estimate is not rounded. Source: arXiv 2509.24372, section 3.

    Args:
      generator: the generator that draws ε, a key of `es_jax.core.rng.GENERATORS`. Another one draws other noise.
      pairs_scaled_first: how the two weights of an antithetic pair are added. True multiplies each by −1/N before the
        sum, as runs with random streams 1 and 2 did. CPUs fuse that product and sum and GPUs do not, so their last bits
        differ.

    Raises:
      ValueError: `generator` is not a known name.

    Examples:
      >>> import jax.numpy as jnp
      >>> from es_jax.es.population import Population
      >>> members = Population(2, seed=0, antithetic=True).members(0)
      >>> params, noise = {"w": jnp.zeros(3)}, GaussianNoise()
      >>> up, down = (noise.apply(params, member, sigma=0.1) for member in members)
      >>> float(jnp.abs(up["w"] + down["w"]).max())
      0.0
      >>> noise.estimate(params, members, jnp.array([1.0, -1.0]))["w"].shape
      (3,)
    """

    generator: str = rng.DEFAULT
    pairs_scaled_first: bool = False

    def __post_init__(self):
        if self.generator not in rng.GENERATORS:
            raise ValueError(unknown("generator", self.generator, rng.GENERATORS))

    def perturbs(self, name: str, leaf: Any) -> bool:
        """Says whether a leaf gets noise; here every leaf does.

        Args:
          name: the leaf's name, such as "layers/attn/q/kernel".
          leaf: the leaf, or anything with its shape.

        Returns:
          True where the leaf gets noise.
        """
        return True

    @property
    def layers_alone(self) -> bool:
        """Whether the noise of one layer can be drawn alone, at its own cost and with the same bits."""
        return self.generator == "threefry13"

    @property
    def elementwise(self) -> bool:
        """Whether each number of ε can be drawn alone, from a seed, the leaf's name and shape, and an index."""
        return type(self) is GaussianNoise and self.generator == "threefry13"

    def apply_at(
        self, name: str, shape: tuple[int, ...], index: Sequence[Array], seed: Array, scale: Array, leaf: Array
    ) -> Float[Array, "..."]:
        """Does what `apply` does, for some elements of a leaf and inside a Pallas kernel.

        Args:
          name: the leaf's name.
          shape: the leaf's shape.
          index: one integer array for each axis: the elements' places.
          seed: uint32 scalar, the member's seed.
          scale: sign·σ, float32 scalar.
          leaf: the elements' values θ.

        Returns:
          θ + scale·ε of these elements, float32; it is not cast to the leaf's dtype yet.
        """
        return leaf.astype(jnp.float32) + _rounded(scale * rng.normal_at(seed, name, shape, index))

    def estimate_at(
        self, name: str, shape: tuple[int, ...], index: Sequence[Array], seeds: Any, signed: Any
    ) -> Float[Array, "..."]:
        """Does what `estimate` does, for some elements of a leaf and inside a Pallas kernel.

        Args:
          name: the leaf's name.
          shape: the leaf's shape.
          index: one integer array for each axis: the elements' places.
          seeds: uint32 [n], from `summands`.
          signed: float32 [n], from `summands`.

        Returns:
          The gradient of these elements, float32.
        """

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
        """Perturbs a model: cast(θ + sign·σ·ε).

        Args:
          params: any pytree of floating-point arrays.
          member: one member, `members[i]` or one slot of a vmap.
          sigma: σ > 0, the noise scale. A traced value is not checked.
          dtype: the dtype of the result's leaves. By default each leaf keeps its own.
          row: (i, n) where every leaf [k, …] is k rows, from row i on, of a larger leaf [n, …]. The noise is that of
            the larger leaf, which need not exist.

        Returns:
          A tree like `params`.

        Raises:
          ValueError: `sigma` is a number that is not above 0.
          TypeError: a leaf is not floating point. The message names it.
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
        """Estimates the gradient of minus the mean reward, −(1/N) Σ wₙ signₙ εₙ, which any optax optimizer descends.

        The papers fold 1/σ into the learning rate, and so does this. The noise is drawn again from the seeds, each
        number once, and is added in member order. A pair's noise is drawn once and weighted by z⁺ − z⁻. Memory does not
        grow with N.

        Args:
          params: any pytree of floating-point arrays; only names, shapes and dtypes are read.
          members: the N members that were evaluated.
          weights: [N], the shaped rewards, such as `z_score(rewards)`.

        Returns:
          A tree like `params`, float32 (float64 for float64 leaves).

        Raises:
          ValueError: `weights` is not one number for each member.
          TypeError: a leaf is not floating point. The message names it.
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
        """Gives the seeds, and the factor of the noise of each, whose sum is the estimate.

        Args:
          members: the N members.
          weights: [N], the shaped rewards.

        Returns:
          Seeds, uint32 [n], and factors, float32 [n], where n is N, or N/2 for pairs. A factor is −wₙ signₙ / N; that
            of a pair is −(z⁺ − z⁻) / N.

        Raises:
          ValueError: `weights` is not one number for each member.
        """
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
    """The published code's noise: leaves of one shape share their noise, and all arithmetic is in the leaf's own dtype.

    Its use is to explain published results. With float16 parameters it reproduces the published drift of arXiv
    2605.30148, rounding included. It is not a way to train: the shared noise ties equal-shaped layers together, and
    16-bit sums lose small updates. The methods are those of `GaussianNoise`; there, "float32" is the leaf's dtype.

    Args:
      generator: the generator that draws ε, a key of `es_jax.core.rng.GENERATORS`.
      pairs_scaled_first: how the two weights of an antithetic pair are added, as in `GaussianNoise`.
      stacked: a prefix of names. A leaf with such a name holds one parameter for each index of its first axis, as
        layers stacked for a scan do. All of them share the noise of one parameter's shape.

    Raises:
      ValueError: `generator` is not a known name.

    Examples:
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
