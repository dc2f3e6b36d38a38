"""A matrix that many members share, beside the few numbers in which one of them differs from it."""

import dataclasses
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + a bᵀ, which is never made: products with it are the sum of both products (arXiv 2511.16652, section 3).

    Attributes:
      base: [D, F] (or what holds it), the same for all members.
      a, b: [D, r] and [F, r], of one member, float32: they are small, and rounding them would add to that of the base.
      rest: what `base` lost when it was rounded, or None: a row that is looked up is rounded, and is to be once.
    """

    base: Any
    a: Float[Array, "*n D r"]
    b: Float[Array, "*n F r"]
    rest: Any = None

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def correction(self, x: Float[Array, "*n D"], *, transposed: bool = False) -> Float[Array, "*n F"]:
        """x a bᵀ, float32: what a product with `base` lacks; `transposed`: x b aᵀ, of one with its transpose."""
        first, second = (self.b, self.a) if transposed else (self.a, self.b)
        return _product(_product(x.astype(jnp.float32), first, axis=0), second, axis=1)

    def rows(self, index: Array) -> Array:
        """The rows of base + a bᵀ with those indices, summed in float32 and cast once."""
        take = lambda x: jnp.take(x, index, axis=0, mode="clip").astype(jnp.float32)  # noqa: E731
        row = take(self.base) + _product(take(self.a), self.b, axis=1)
        return (row if self.rest is None else row + take(self.rest)).astype(self.dtype)


def split(leaf: Float[Array, "*n"], dtype: Any) -> tuple[Array, Array | None]:
    """The leaf in a dtype, and what it lost by that, in the same dtype; None where it is of that dtype.

    >>> base, rest = split(jnp.float32([1 + 2**-9]), jnp.bfloat16)
    >>> float(base[0]), float(rest[0]) == 2**-9
    (1.0, True)
    """
    if leaf.dtype == dtype:
        return leaf, None
    kind = jnp.finfo(dtype)
    near = lax.reduce_precision(leaf, kind.nexp, kind.nmant)  # a compiler may take a cast there and back for nothing
    return near.astype(dtype), (leaf - near).astype(dtype)


def _product(x: Array, y: Array, *, axis: int) -> Array:
    """Of float32, and so on devices whose products are of fewer bits too."""
    return lax.dot_general(x, y, (((x.ndim - 1,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST)
