"""The layers of the transformer as Linen modules: norm, rotary positions, attention, gated MLP, block.

Matrix products run in the compute dtype (that of the weights) and accumulate in float32; norms, rotary
positions and the softmax are float32; what passes between layers is in the compute dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from es_jax.models.cache import write
from es_jax.models.config import TransformerConfig

INIT_STD = 0.02
MASKED = -1e30  # finite: a query that may attend nothing gets a mean of the values, not NaN
Angles = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
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


def rope_angles(positions: Int[Array, "B T"], *, head_dim: int, theta: float) -> Angles:
    """Cosine and sine, float32 [B, T, head_dim/2], of position * theta^(-2i/head_dim).

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = 1.0 / np.float32(theta) ** exponent
    angle = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequency)[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T H hd"], angles: Angles) -> Float[Array, "B T H hd"]:
    """Turn the pairs (x[i], x[i + hd/2]) of every head by the angles of the token's position."""
    cos, sin = (a[:, :, None, :] for a in angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S KH hd"],
    v: Float[Array, "B S KH hd"],
    *,
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H hd"]:
    """Softmax attention; each run of H/KH query heads shares one key/value head, which is never repeated.

    Source of the grouping: Ainslie et al. 2023, arXiv 2305.13245.
    """
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return mixed.astype(q.dtype).reshape(batch, length, heads, head_dim)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis [B, T, D], in float32. Source: arXiv 1910.07467."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale[None, None, :]).astype(x.dtype)


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

        q = rotate(project("q", c.heads), angles)
        k = rotate(project("k", c.kv_heads), angles)
        v = project("v", c.kv_heads)
        if cached is not None:
            index = cached[2]
            k, v = write(cached[0], k, index=index), write(cached[1], v, index=index)
        mixed = attend(q, k, v, mask=mask).reshape(*x.shape[:2], c.heads * c.head_dim)
        return Linear(c.width, name="o")(mixed), (k, v)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv 2002.05202."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = Linear(self.config.mlp_dim, name="gate")(x)
        up = Linear(self.config.mlp_dim, name="up")(x)
        return Linear(self.config.width, name="down")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the MLP, each behind its norm and added to the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], angles: Angles, mask: Bool[Array, "B T S"], cached: Cached | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        eps = self.config.norm_eps
        mixed, kv = Attention(self.config, name="attn")(RMSNorm(eps, name="attn_norm")(x), angles, mask, cached)
        x = x + mixed
        return x + MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x)), kv
