"""A matrix that many members share, with the few numbers by which one member differs from it."""

import dataclasses
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + a bᵀ, which is never formed: a product with it is the sum of two products (arXiv 2511.16652, section 3).

    Attributes:
      base: [D, F] (or a wrapper of it), the same for all members.
      a, b: [D, r] and [F, r], of one member, in float32: they are small, and rounding them would add to the base's
        rounding.
      rest: the rounding error of `base`, or None. With it a looked-up row is rounded only once.
    """

    base: Any
    a: Float[Array, "*n D r"]
    b: Float[Array, "*n F r"]
    rest: Any = None

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def correction(self, x: Float[Array, "*n D"], *, transposed: bool = False) -> Float[Array, "*n F"]:
        """x a bᵀ in float32, to add to a product with `base`; `transposed`: x b aᵀ, for a product with its
        transpose."""
        first, second = (self.b, self.a) if transposed else (self.a, self.b)
        return _product(_product(x.astype(jnp.float32), first, axis=0), second, axis=1)

    def rows(self, index: Array) -> Array:
        """The rows of base + a bᵀ with those indices, summed in float32 and cast once."""
        take = lambda x: jnp.take(x, index, axis=0, mode="clip").astype(jnp.float32)  # noqa: E731
        row = take(self.base) + _product(take(self.a), self.b, axis=1)
        return (row if self.rest is None else row + take(self.rest)).astype(self.dtype)


def split(leaf: Float[Array, "*n"], dtype: Any) -> tuple[Array, Array | None]:
    """The leaf in a dtype, and its rounding error in the same dtype; None if it already has that dtype.

    >>> base, rest = split(jnp.float32([1 + 2**-9]), jnp.bfloat16)
    >>> float(base[0]), float(rest[0]) == 2**-9
    (1.0, True)
    """
    if leaf.dtype == dtype:
        return leaf, None
    kind = jnp.finfo(dtype)
    near = lax.reduce_precision(leaf, kind.nexp, kind.nmant)  # a compiler may remove a cast there and back
    return near.astype(dtype), (leaf - near).astype(dtype)


def _product(x: Array, y: Array, *, axis: int) -> Array:
    """A float32 product, even on devices whose default products have fewer bits."""
    return lax.dot_general(x, y, (((x.ndim - 1,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST)
