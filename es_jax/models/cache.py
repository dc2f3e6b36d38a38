"""The keys and values of tokens already seen, and where each of them stands."""

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

# One array with a leading axis of L layers, or L arrays without it.
PerLayer = Array | tuple[Array, ...]


@struct.dataclass
class Past:
    """Keys and values of tokens that came before a cache's own: they are attended and never written.

    `k`: per layer [B, KH, hd, S], so that the products with a query run along the places. `v`: [B, KH, S, hd].
    `positions`: int32 [B, S], -1 where nothing stands. With B = 1 all rows share them.
    """

    k: PerLayer
    v: PerLayer
    positions: Int[Array, "B S"]

    @property
    def kv(self) -> tuple[PerLayer, PerLayer]:
        return self.k, self.v


@struct.dataclass
class RowCache:
    """Caches of rows to which a step adds one token each, in place, every row at its own place; of unrolled layers.

    `k`: per layer [B, KH, hd, S], `v`: per layer [B, KH, S, hd], S as `decode_attention.whole_blocks` gives it.
    `length`: int32 [B], tokens that are there, at the places 0..length − 1; below S. `past`: what all rows attend
    besides (B = 1), at the positions before these.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    length: Int[Array, " B"]
    past: tuple[Past, ...] = ()

    @property
    def kv(self) -> tuple[PerLayer, PerLayer]:
        return self.k, self.v

    def places(self, query: Int[Array, "B 1"], *, window: int | None) -> Places:
        """What the new token of each row attends; nothing where its position is -1."""
        end = self.length + 1
        first = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
        return Places(new=self.length, first=first, end=jnp.where(query[:, 0] < 0, 0, end))


@struct.dataclass
class KVCache(Past):
    """S places a row, some yet empty. A place holds the key and value of one token, and its position, -1 when empty.

    `k` and `v` are stacked over a leading axis of L layers (for the scanned layers) or tuples of L arrays (for unrolled
    layers), which layers only read. `index`: the next place to write, shared by all rows. `past`: what is attended
    besides. Who attends whom follows from positions alone: padding, at position -1, costs a place and changes nothing.
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
        """Raises ValueError when so many tokens do not fit; inside jit, `index` unknown, the caller sees to it."""
        length = self.positions.shape[1]
        used = 0 if isinstance(self.index, jax.core.Tracer) else int(self.index)
        if used + new > length:
            raise ValueError(
                f"cache length = {length} is too short: {used} places are used, {new} more are needed; "
                f"make it with length >= {used + new}"
            )

    def used_before(self, new: int) -> tuple[Past, ...]:
        """What so many tokens find in the cache: itself, or nothing where they fill it."""
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
