"""The keys and values of tokens already seen, and where each of them stands."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from es_jax.models.config import TransformerConfig

# One array [L, B, S, KH, hd], or L arrays [B, S, KH, hd].
PerLayer = Array | tuple[Array, ...]


@struct.dataclass
class KVCache:
    """S slots a row. A slot holds the key and value of one token and that token's position, -1 when empty.

    `k`, `v`: stacked [L, B, S, KH, hd] (for the scanned layers) or a tuple of L arrays [B, S, KH, hd] (for
    unrolled layers, which update them in place). `positions`: int32 [B, S]. `index`: int32 scalar, the next
    slot to write, shared by all rows. Who attends whom follows from positions alone, never from slots, so
    padding on either side is marked by position -1 and costs a slot but changes no result.
    """

    k: PerLayer
    v: PerLayer
    positions: Int[Array, "B S"]
    index: Int[Array, ""]

    @classmethod
    def empty(
        cls, config: TransformerConfig, batch: int, *, length: int, dtype: jnp.dtype, stacked: bool = True
    ) -> "KVCache":
        """A cache of `length` empty slots for `batch` rows; `dtype` is the compute dtype.

        >>> config = TransformerConfig(family="llama", vocab_size=32, width=16, layers=2, heads=4, kv_heads=2,
        ...                            head_dim=8, mlp_dim=24)
        >>> KVCache.empty(config, 3, length=10, dtype=jnp.float32).k.shape
        (2, 3, 10, 2, 8)
        """
        shape = (batch, length, config.kv_heads, config.head_dim)

        def zeros() -> PerLayer:
            if stacked:
                return jnp.zeros((config.layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

        return cls(
            k=zeros(),
            v=zeros(),
            positions=jnp.full((batch, length), -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    @property
    def stacked(self) -> bool:
        """Whether the layers are one array with a leading layer axis."""
        return not isinstance(self.k, tuple)

    @property
    def length(self) -> int:
        """S, the number of slots."""
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
                f"cache length = {self.length} is too short: {used} slots are used, {new} more are needed; "
                f"make it with length >= {used + new}"
            )
        stored = jax.lax.dynamic_update_slice(self.positions, positions, (0, self.index))
        return self.replace(positions=stored, index=self.index + new)  # type: ignore[attr-defined]

    def grow(self, slots: int) -> "KVCache":
        """The same cache with `slots` more empty slots behind those it has."""

        def longer(x: Array, axis: int, fill: int = 0) -> Array:
            return jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)], constant_values=fill)

        k, v = jax.tree.map(lambda x: longer(x, x.ndim - 3), (self.k, self.v))
        return self.replace(k=k, v=v, positions=longer(self.positions, 1, -1))  # type: ignore[attr-defined]


def write(slots: Array, new: Array, *, index: Int[Array, ""]) -> Array:
    """One layer's slots [B, S, KH, hd] with `new` [B, T, KH, hd] written from slot `index` on."""
    return jax.lax.dynamic_update_slice(slots, new, (0, index, 0, 0))


def attention_mask(
    query: Int[Array, "B T"], held: Int[Array, "B S"], *, window: int | None = None
) -> Bool[Array, "B T S"]:
    """True where the query at position p may attend the slot at position s: 0 <= s <= p, and p - window < s.

    >>> attention_mask(jnp.array([[1]]), jnp.array([[-1, 0, 1, 2]])).astype(int).tolist()
    [[[0, 1, 1, 0]]]
    """
    held, query = held[:, None, :], query[:, :, None]
    seen = (held >= 0) & (held <= query)
    return seen if window is None else seen & (held > query - window)
