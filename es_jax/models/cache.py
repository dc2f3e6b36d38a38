"""The keys, values and positions of tokens already seen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from es_jax.core.mesh import require_32_bits
from es_jax.models.config import TransformerConfig
from es_jax.models.decode_attention import Places

# One array with a leading axis of L layers, or L arrays without that axis.
PerLayer = Array | tuple[Array, ...]


@struct.dataclass
class Past:
    """Keys and values of tokens before a cache's own tokens: they are attended but never written.

    `k`: per layer [B, KH, hd, S], so that the products with a query run along the places. `v`: [B, KH, S, hd].
    `positions`: int32 [B, S], -1 at empty places. With B = 1 all rows share them.
    """

    k: PerLayer
    v: PerLayer
    positions: Int[Array, "B S"]

    @property
    def kv(self) -> tuple[PerLayer, PerLayer]:
        return self.k, self.v


@struct.dataclass
class RowCache:
    """Caches to which a step adds one token per row in place, at each row's own place; for unrolled layers.

    `k`: per layer [B, KH, hd, S], `v`: per layer [B, KH, S, hd], S as `decode_attention.whole_blocks` gives it.
    `length`: int32 [B], the number of tokens, at the places 0..length − 1; below S. `past`: tokens at earlier positions
    that all rows attend too (B = 1).
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    length: Int[Array, " B"]
    past: tuple[Past, ...] = ()

    @property
    def kv(self) -> tuple[PerLayer, PerLayer]:
        return self.k, self.v

    def places(self, query: Int[Array, "B 1"], *, window: int | None) -> Places:
        """The places that the new token of each row attends; none if its position is -1."""
        end = self.length + 1
        first = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
        return Places(new=self.length, first=first, end=jnp.where(query[:, 0] < 0, 0, end))


@struct.dataclass
class KVCache(Past):
    """S places for each row, some still empty. A place holds the key and value of one token and its position, -1 if
    empty.

    `k` and `v` are stacked over a leading axis of L layers (for scanned layers) or tuples of L arrays (for unrolled
    layers); layers only read them. `index`: the next place to write, shared by all rows. `past`: further tokens to
    attend. Attention masks follow from positions alone: padding, at position -1, takes a place and changes nothing.
    """

    index: Int[Array, ""]
    past: tuple[Past, ...] = ()

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        batch: int,
        *,
        length: int,
        dtype: DTypeLike,
        stacked: bool = True,
        past: tuple[Past, ...] = (),
    ) -> "KVCache":
        """A cache of `length` empty places for `batch` rows, after `past`; `dtype` is the compute dtype."""
        require_32_bits()

        def zeros(*shape: int) -> PerLayer:
            shape = (batch, config.kv_heads, *shape)
            if stacked:
                return jnp.zeros((config.layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

        return cls(
            k=zeros(config.head_dim, length),
            v=zeros(length, config.head_dim),
            positions=jnp.full((batch, length), -1, jnp.int32),
            index=jnp.int32(0),
            past=past,
        )

    def check_room(self, new: int) -> None:
        """Raises ValueError if so many tokens do not fit. Inside jit `index` is unknown, so the caller must check."""
        length = self.positions.shape[1]
        used = 0 if isinstance(self.index, jax.core.Tracer) else int(self.index)
        if used + new > length:
            raise ValueError(
                f"cache length = {length} is too short: {used} places are used and {new} more are needed; make the "
                f"cache with length >= {used + new}"
            )

    def used_before(self, new: int) -> tuple[Past, ...]:
        """The cache before so many tokens are added: itself, or None if they fill it."""
        return (self,) if new < self.positions.shape[1] else ()

    def extended(self, k: PerLayer, v: PerLayer, positions: Int[Array, "B T"]) -> "KVCache":
        """The cache with the keys, values and positions of T more tokens, written once, in the next places."""
        new = positions.shape[1]

        def write(whole: Array, some: Array, axis: int) -> Array:
            if new == whole.shape[axis]:
                return some
            return jax.lax.dynamic_update_slice_in_dim(whole, some, self.index, axis)

        return dataclasses.replace(
            self,
            k=jax.tree.map(functools.partial(write, axis=-1), self.k, k),
            v=jax.tree.map(functools.partial(write, axis=-2), self.v, v),
            positions=write(self.positions, positions, 1),
            index=self.index + new,
        )


def attention_mask(
    query: Int[Array, "B T"], key: Int[Array, "#B S"], *, window: int | None = None
) -> Bool[Array, "B T S"]:
    """True where the query at position p may attend the key at position s: 0 <= s <= p, and p - window < s."""
    key, query = key[:, None, :], query[:, :, None]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)
