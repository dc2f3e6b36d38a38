"""The keys and values of tokens already seen, and where each of them stands."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from es_jax.core.mesh import require_32_bits
from es_jax.models.config import TransformerConfig

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
class KVCache(Past):
    """S places a row, some yet empty. A place holds the key and value of one token, and its position, -1 when empty.

    `k` and `v` are stacked over a leading axis of L layers (for the scanned layers) or tuples of L arrays (for unrolled
    layers, which update them in place). `index`: the next place to write, shared by all rows. `past`: what is attended
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

    def advance(self, positions: Int[Array, "B T"]) -> "KVCache":
        """The cache after T more tokens: their positions are stored and `index` moves on. Writes no keys.

        Raises ValueError when T tokens cannot fit. Inside jit `index` is unknown: there the caller sees to it.
        """
        new, length = positions.shape[1], self.positions.shape[1]
        used = 0 if isinstance(self.index, jax.core.Tracer) else int(self.index)
        if used + new > length:
            raise ValueError(
                f"cache length = {length} is too short: {used} places are used, {new} more are needed; "
                f"make it with length >= {used + new}"
            )
        positions = jax.lax.dynamic_update_slice(self.positions, positions, (0, self.index))
        return dataclasses.replace(self, positions=positions, index=self.index + new)


def attention_mask(
    query: Int[Array, "B T"], key: Int[Array, "#B S"], *, window: int | None = None
) -> Bool[Array, "B T S"]:
    """True where the query at position p may attend the key at position s: 0 <= s <= p, and p - window < s."""
    key, query = key[:, None, :], query[:, :, None]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)
