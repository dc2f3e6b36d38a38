"""The layers of the transformer as Linen modules: norm, rotary positions, attention, gated MLP, block.

Matrix products run in the compute dtype (that of the weights) and accumulate in float32; norms, rotary
positions and the softmax are float32; what passes between layers is in the compute dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float

from es_jax.core.chunked_map import block_length, in_blocks
from es_jax.core.low_rank import LowRank
from es_jax.models.config import TransformerConfig
from es_jax.models.decode_attention import Places, attend_places, written
from es_jax.models.rope import Angles, rotate

INIT_STD = 0.02
QUERIES = 64  # least queries in a block of attention
MASKED = -1e30  # finite: a query without any key gets a mean of the values, not NaN
Stream = Float[Array, "B T D"]  # the residual stream
KV = tuple[Array, Array]  # keys [B, KH, hd, S] and values [B, KH, S, hd]; B = 1 if all rows share them
Masks = tuple[Bool[Array, "B T _"] | Places, ...]  # masks, one for each of the attended pieces
dot_general = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


@struct.dataclass
class Transposed:
    """A kernel [D, F] that is stored as [F, D], with which CPUs multiply few rows fastest (docs/speed.md)."""

    transposed: Float[Array, "F D"]


def linear(
    x: Float[Array, "*b D"], kernel: Any, bias: Float[Array, " F"] | None = None, *, accumulated: bool = False
) -> Float[Array, "*b F"]:
    """x @ kernel (+ bias). Every product of activations with a kernel [D, F] is made here; the kernel may be
    `Transposed`, or `LowRank` of either.

    The result has x's dtype, or with `accumulated` the accumulator's, float32.
    """
    axis, correction = 0, None
    if isinstance(kernel, LowRank):
        kernel, correction = kernel.base, kernel.correction(x)
    if isinstance(kernel, Transposed):  # tied to x, else XLA would transpose it once before a loop
        (x, kernel), axis = lax.optimization_barrier((x, kernel.transposed)), 1
    y = dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())))
    y = y if correction is None else y + correction
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return y if accumulated else y.astype(x.dtype)


def softcap(x: Float[Array, "*b N"], cap: float | None) -> Float[Array, "*b N"]:
    """cap * tanh(x / cap), which is close to x for small |x|; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Float[Array, "B T H hd"],
    pieces: Sequence[KV],
    *,
    masks: Sequence[Bool[Array, "B T _"]],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """Softmax attention over the keys and values of all pieces.

    Each group of H/KH consecutive query heads shares one key/value head, which is never repeated in memory (Ainslie et
    al. 2023, arXiv 2305.13245). A piece with B = 1 is shared by all rows. Scores are products times `scale`,
    soft-capped at `cap`. They are made for a block of queries at a time, so that [B, H, T, S] of a long prompt is never
    in memory.
    """
    scores = len(q) * q.shape[2] * sum(mask.shape[2] for mask in masks)
    block = block_length(4 * scores, multiple=QUERIES)  # four: about as many arrays of that size exist at once
    return in_blocks(functools.partial(_attended, pieces=pieces, scale=scale, cap=cap), q, *masks, block=block)


def _attended(q: Array, *masks: Array, pieces: Sequence[KV], scale: float, cap: float | None) -> Array:
    batch, length, heads, head_dim = q.shape
    kv_heads = pieces[0][0].shape[1]
    grouped = (batch, kv_heads, heads // kv_heads, length)
    q = q.reshape(batch, length, *grouped[1:3], head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim)
    scores = [
        jnp.where(mask[:, None, None], softcap(_product(q, k).reshape(*grouped, -1) * scale, cap), MASKED)
        for (k, _), mask in zip(pieces, masks, strict=True)
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1)).astype(q.dtype)
    ends = np.cumsum([score.shape[-1] for score in scores])[:-1]
    parts = jnp.split(weights.reshape(batch, kv_heads, -1, weights.shape[-1]), ends, axis=-1)
    mixed = sum(_product(part, v) for part, (_, v) in zip(parts, pieces, strict=True))
    mixed = jnp.asarray(mixed).astype(q.dtype).reshape(*grouped, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _product(x: Float[Array, "B KH M a"], y: Float[Array, "_ KH a c"]) -> Float[Array, "B KH M c"]:
    """x @ y for every row and head; if all rows share one y, they are multiplied together.

    Written out, since einsum may choose an order of operands that is six times slower on CPUs.
    """
    if len(y) == 1 < len(x):
        return dot_general(x, y[0], (((3,), (1,)), ((1,), (0,)))).transpose(1, 0, 2, 3)
    return dot_general(x, y, (((3,), (2,)), ((0, 1), (0, 1))))


class RMSNorm(nn.Module):
    """x / rms(x) * scale, or * (1 + scale), over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        offset = float(self.config.norm_plus_one)
        scale = self.param("scale", nn.initializers.constant(1.0 - offset), (x.shape[-1],)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide * jnp.broadcast_to(scale + offset, wide.shape)).astype(x.dtype)


class Linear(nn.Module):
    """`linear` with a kernel [D, features] and optionally a bias [features]."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Stream) -> Float[Array, "B T F"]:
        kernel: Any = self.get_variable("params", "kernel")  # `param` does not allow a `Transposed` kernel
        if kernel is None:
            kernel = self.param("kernel", nn.initializers.normal(INIT_STD), (x.shape[-1], self.features))
        return linear(x, kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. Returns the output, and the tokens' own keys and values.

    `attended`: keys and values of earlier tokens, in pieces, which are only read. `masks`: one for each piece, and last
    one for the tokens themselves. If the last mask is `Places`, the last piece is the rows' own caches; the tokens are
    added to them, and they are returned instead of the tokens' own keys and values.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Stream, angles: Angles, masks: Masks, attended: Sequence[KV]) -> tuple[Stream, KV]:
        c = self.config

        def project(name: str, heads: int, *, turn: bool = True) -> Array:
            y = Linear(heads * c.head_dim, use_bias=c.qkv_bias, name=name)(x).reshape(*x.shape[:2], heads, c.head_dim)
            if turn and c.qk_norm:
                y = RMSNorm(c, name=f"{name}_norm")(y)
            return rotate(y, angles) if turn else y

        q, k, v = project("q", c.heads), project("k", c.kv_heads), project("v", c.kv_heads, turn=False)
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        options: Any = {"scale": (c.query_pre_attn_scalar or c.head_dim) ** -0.5, "cap": c.attn_softcap}
        seen: Any = masks[:-1]
        last = masks[-1]
        if isinstance(last, Places):  # the rows' own caches, to which the tokens are added
            k, v = written(attended[-1], k, v, last.new)
            mixed = attend_places(q, (k, v), last, shared=attended[:-1], masks=seen, **options)
        else:
            mixed = attend(q, [*attended, (k, v)], masks=(*seen, last), **options)
        mixed = mixed.reshape(*x.shape[:2], c.heads * c.head_dim)
        return Linear(c.width, name="o")(mixed), (k, v)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)). Source: Shazeer 2020, arXiv 2002.05202."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Stream, again: Stream) -> Stream:  # the same twice
        c = self.config
        act = jax.nn.silu if c.activation == "silu" else jax.nn.gelu  # gelu: the tanh approximation
        gate, up = Linear(c.mlp_dim, name="gate")(x), Linear(c.mlp_dim, name="up")(again)
        return Linear(c.width, name="down")(act(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the MLP, each preceded by a norm and added to the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Stream, angles: Angles, masks: Masks, attended: Sequence[KV]) -> tuple[Stream, KV]:
        c, norm = self.config, functools.partial(RMSNorm, self.config)
        # A GPU's compiler repeats the sum over the parts of a product at each use, and merges gate and up into one
        # product that it writes in float32. Both move more bytes than the sum itself, or than two products in their own
        # dtype.
        apart = lax.optimization_barrier if isinstance(masks[-1], Places) else lambda x: x
        mixed, kv = Attention(c, name="attn")(norm(name="attn_norm")(x), angles, masks, attended)
        x = apart(x + (norm(name="attn_post_norm")(mixed) if c.post_norms else mixed))
        normed = norm(name="mlp_norm")(x)
        y = MLP(c, name="mlp")(normed, apart(normed))
        return apart(x + (norm(name="mlp_post_norm")(y) if c.post_norms else y)), kv
