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
    `positions`: int32 [B, S], -1 where nothing stands. With B = 1 all rows share them, as they do the beginning that a
    task's prompts have in common.
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
    layers, which update them in place). `index`: int32 scalar, the next place to write, shared by all rows. `past`:
    what is attended besides; another cache will do. Who attends whom follows from positions alone, never from places:
    padding on either side is marked by position -1, costs a place and changes no result.
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
        """A cache of `length` empty places for `batch` rows, after `past`; `dtype` is the compute dtype.

        >>> config = TransformerConfig(family="llama", vocab_size=32, width=16, layers=2, heads=4, kv_heads=2,
        ...                            head_dim=8, mlp_dim=24)
        >>> KVCache.empty(config, 3, length=10, dtype=jnp.float32).k.shape
        (2, 3, 2, 8, 10)
        """
        require_32_bits()
        heads = (batch, config.kv_heads)

        def zeros(*shape: int) -> PerLayer:
            if stacked:
                return jnp.zeros((config.layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

        return cls(
            k=zeros(*heads, config.head_dim, length),
            v=zeros(*heads, length, config.head_dim),
            positions=jnp.full((batch, length), -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
            past=past,
        )

    @property
    def stacked(self) -> bool:
        """Whether the layers are one array with a leading layer axis."""
        return not isinstance(self.k, tuple)

    @property
    def length(self) -> int:
        """S, the number of places."""
        return self.positions.shape[1]

    def advance(self, positions: Int[Array, "B T"]) -> "KVCache":
        """The cache after T more tokens: their positions are stored and `index` moves on. Writes no keys.

        Raises ValueError when T tokens cannot fit. Inside jit `index` is unknown, so there the caller must
        see to it that index + T <= S.
        """
        new = positions.shape[1]
        used = 0 if isinstance(self.index, jax.core.Tracer) else int(self.index)
        if used + new > self.length:
            raise ValueError(
                f"cache length = {self.length} is too short: {used} places are used, {new} more are needed; "
                f"make it with length >= {used + new}"
            )
        stored = jax.lax.dynamic_update_slice(self.positions, positions, (0, self.index))
        return dataclasses.replace(self, positions=stored, index=self.index + new)


def attention_mask(
    query: Int[Array, "B T"], key: Int[Array, "#B S"], *, window: int | None = None
) -> Bool[Array, "B T S"]:
    """True where the query at position p may attend the key at position s: 0 <= s <= p, and p - window < s.

    >>> attention_mask(jnp.array([[1]]), jnp.array([[-1, 0, 1, 2]])).astype(int).tolist()
    [[[0, 1, 1, 0]]]
    """
    key, query = key[:, None, :], query[:, :, None]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)
