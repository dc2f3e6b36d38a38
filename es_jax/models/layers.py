"""The layers of the transformer as Linen modules: norm, rotary positions, attention, gated MLP, block.

Matrix products run in the compute dtype (that of the weights) and accumulate in float32; norms, rotary
positions and the softmax are float32; what passes between layers is in the compute dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from es_jax.models.cache import write
from es_jax.models.config import TransformerConfig
from es_jax.models.rope import Angles, rotate

INIT_STD = 0.02
MASKED = -1e30  # finite: a query that may attend nothing gets a mean of the values, not NaN
Cached = tuple[Array, Array, Int[Array, ""]]  # k, v [B, S, KH, hd] and the slot to write


def linear(
    x: Float[Array, "*b D"], kernel: Any, bias: Float[Array, " F"] | None = None, *, accumulated: bool = False
) -> Float[Array, "*b F"]:
    """x @ kernel (+ bias): the only place where activations meet a kernel [D, F]. Accumulates in float32.

    The result has x's dtype, or with `accumulated` the accumulator's, float32.

    >>> linear(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(4)).tolist()[0]
    [4.0, 4.0, 4.0, 4.0]
    """
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x, kernel, contract, preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return y if accumulated else y.astype(x.dtype)


def softcap(x: Float[Array, "*b N"], cap: float | None) -> Float[Array, "*b N"]:
    """cap * tanh(x / cap), which is near x where |x| is small; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S KH hd"],
    v: Float[Array, "B S KH hd"],
    *,
    mask: Bool[Array, "B T S"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """Softmax attention; each run of H/KH query heads shares one key/value head, which is never repeated.

    Scores are products times `scale`, soft-capped at `cap`. Source of the grouping: Ainslie et al. 2023,
    arXiv 2305.13245.
    """
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], softcap(scores, cap), MASKED), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return mixed.astype(q.dtype).reshape(batch, length, heads, head_dim)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32; times 1 + scale where the config's norms are so.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        offset = 1.0 if self.config.norm_plus_one else 0.0
        scale = self.param("scale", nn.initializers.constant(1.0 - offset), (x.shape[-1],)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide * jnp.broadcast_to(scale + offset, wide.shape)).astype(x.dtype)


class Linear(nn.Module):
    """`linear` with a kernel [D, features] and perhaps a bias [features]."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        kernel = self._weight("kernel", nn.initializers.normal(INIT_STD), (x.shape[-1], self.features))
        bias = self._weight("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return linear(x, kernel, bias)

    def _weight(self, name: str, init: Callable[..., Array], shape: tuple[int, ...]) -> Any:
        # Read as it is, without Linen's shape check: a kernel may be any leaf that `linear` understands.
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, init, shape)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. Gives the output and the keys and values attended."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], angles: Angles, mask: Bool[Array, "B T S"], cached: Cached | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        c = self.config

        def project(name: str, heads: int) -> Array:
            y = Linear(heads * c.head_dim, use_bias=c.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:2], heads, c.head_dim)

        def turned(name: str, heads: int) -> Array:
            y = project(name, heads)
            return rotate(RMSNorm(c, name=f"{name}_norm")(y) if c.qk_norm else y, angles)

        q, k, v = turned("q", c.heads), turned("k", c.kv_heads), project("v", c.kv_heads)
        if cached is not None:
            index = cached[2]
            k, v = write(cached[0], k, index=index), write(cached[1], v, index=index)
        scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
        mixed = attend(q, k, v, mask=mask, scale=scale, cap=c.attn_softcap)
        return Linear(c.width, name="o")(mixed.reshape(*x.shape[:2], c.heads * c.head_dim)), (k, v)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)). Source: Shazeer 2020, arXiv 2002.05202."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        act = jax.nn.silu if self.config.activation == "silu" else jax.nn.gelu  # gelu: the tanh approximation
        gate = Linear(self.config.mlp_dim, name="gate")(x)
        up = Linear(self.config.mlp_dim, name="up")(x)
        return Linear(self.config.width, name="down")(act(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the MLP, each behind its norm and added to the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], angles: Angles, mask: Bool[Array, "B T S"], cached: Cached | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        c = self.config

        def norm(name: str, y: Array) -> Array:
            return RMSNorm(c, name=name)(y)

        mixed, kv = Attention(c, name="attn")(norm("attn_norm", x), angles, mask, cached)
        x = x + (norm("attn_post_norm", mixed) if c.post_norms else mixed)
        y = MLP(c, name="mlp")(norm("mlp_norm", x))
        return x + (norm("mlp_post_norm", y) if c.post_norms else y), kv
