"""Attention of one new token a row over caches that are written in place: a kernel for GPUs, which reads live places.

Written in Pallas, which compiles it by Triton: a row's keys and values are read once for all query heads that share
them, from the first place that it attends to the last, and nothing of the size of the scores is ever in memory.
XLA's own products read all places of all rows, and on GPUs write copies of the caches first (docs/speed.md).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int32

from es_jax.core.chunked_map import ceil_div, power_of_two
from es_jax.models.config import TransformerConfig

BLOCK = 64  # places that the kernel reads at a time; a cache has a whole number of blocks
PROGRAMS = 256  # of the kernel at least, since a large GPU runs about as many at once: rows are split to have them
FEWEST_QUERIES = 16  # rows of the smallest product
MASKED, SMALLEST = -1e30, 1e-30
NAME = "decode_attention"  # of the kernel in compiled programs


class Places(NamedTuple):
    """Which places of its cache each row attends, once its new token is there.

    `new`: int32 [B], where the token is written. `first`, `end`: int32 [B], the first place attended and the one after
    the last; rows with `end` 0 attend nothing, and their result is 0.
    """

    new: Int32[Array, " B"]
    first: Int32[Array, " B"]
    end: Int32[Array, " B"]


def supports(config: TransformerConfig) -> bool:
    """Whether the kernel takes heads of that size: Triton's blocks are powers of two."""
    return config.head_dim in (16, 32, 64, 128, 256)


def whole_blocks(places: int) -> int:
    """The fewest places, at least so many, that a cache may have."""
    return ceil_div(places, BLOCK) * BLOCK


def written(cache: tuple[Array, Array], k: Array, v: Array, new: Int32[Array, " B"]) -> tuple[Array, Array]:
    """Keys [B, KH, hd, S] and values [B, KH, S, hd] with those of one token a row, each at its own place."""
    rows = jnp.arange(len(new))
    options: Any = {"indices_are_sorted": True, "unique_indices": True, "mode": "promise_in_bounds"}
    keys, values = cache
    return keys.at[rows, :, :, new].set(k[..., 0], **options), values.at[rows, :, new].set(v[:, :, 0], **options)


def attend_places(
    q: Float[Array, "B 1 H hd"],
    cache: tuple[Array, Array],
    places: Places,
    *,
    shared: Sequence[tuple[Array, Array]] = (),
    masks: Sequence[Bool[Array, "B 1 _"]] = (),
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B 1 H hd"]:
    """What `layers.attend` gives of one query a row, over `places` of caches that hold its own token already.

    Args:
      cache: keys [B, KH, hd, S] and values [B, KH, S, hd] of the rows; S as `whole_blocks` gives it.
      shared: keys and values with B = 1 that all rows attend besides, each with its mask.
    """
    rows, _, heads, head_dim = q.shape
    kv_heads = cache[0].shape[1]
    grouped, splits = q.reshape(rows, kv_heads, heads // kv_heads, head_dim), ceil_div(PROGRAMS, rows * kv_heads)
    call = functools.partial(_over_places, splits=splits, divided=splits == 1 and not shared, scale=scale, cap=cap)
    on_gpu = functools.partial(call, interpret=False)
    parts = [
        lax.platform_dependent(
            grouped, *cache, places.first, places.end,
            cuda=on_gpu, rocm=on_gpu, default=functools.partial(call, interpret=True),
        )
    ]  # fmt: skip
    if splits == 1 and not shared:
        return parts[0][0].reshape(q.shape)
    for (k, v), mask in zip(shared, masks, strict=True):
        parts.append(_over_shared(grouped, k[0], v[0], mask[:, 0], scale=scale, cap=cap))
    mixed, top, total = (jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True))
    share = jnp.exp(top - top.max(axis=2, keepdims=True))
    total = jnp.maximum(jnp.sum(total * share, axis=2), SMALLEST)
    mixed = jnp.sum(mixed * share[..., None], axis=2) / total[..., None]
    return mixed.astype(q.dtype).reshape(q.shape)


def bytes_moved(operands: Sequence[int], results: Sequence[int], *, lengths: Sequence[int]) -> float:
    """What a call of the kernel reads and writes, of the bytes of its operands and results, where the rows attend the
    first so many places (any sample of their lengths, all of which then count alike)."""
    *others, keys, values = operands
    places = whole_blocks(max(lengths))  # of a cache that has no more than the longest needs
    share = sum(map(whole_blocks, lengths)) / len(lengths) / places
    return sum(others) + sum(results) + share * (keys + values)


def _over_shared(q: Array, k: Array, v: Array, mask: Array, *, scale: float, cap: float | None) -> tuple[Array, ...]:
    """As `_over_places` gives it, of one split: keys [KH, hd, S] and values [KH, S, hd] that all rows share."""
    product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    rows, kv_heads, group, head_dim = q.shape
    queries = q.transpose(1, 0, 2, 3).reshape(kv_heads, rows * group, head_dim)
    scores = _capped(product(queries, k, (((2,), (1,)), ((0,), (0,)))) * scale, cap)
    seen = jnp.repeat(mask, group, axis=0)[None]
    top = jnp.max(jnp.where(seen, scores, MASKED), axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    mixed = product(weights.astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))))
    by_row = lambda x: x.reshape(kv_heads, rows, 1, group, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    return by_row(mixed), by_row(top), by_row(weights.sum(axis=-1))


def _capped(scores: Array, cap: float | None) -> Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _over_places(
    q: Array, k: Array, v: Array, first: Array, end: Array, *, splits: int, divided: bool, scale: float,
    cap: float | None, interpret: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """The kernel on queries [B, KH, G, hd], for each of the splits of a row's places: the mixed values
    [B, KH, splits, G, hd], and, [B, KH, splits, G], the largest score and the sum by which they are yet to be divided;
    float32. `divided`: the mixed values alone, in q's dtype.
    """
    from jax.experimental.pallas import triton

    rows, kv_heads, group, head_dim = q.shape
    length = k.shape[3]
    if length % BLOCK:
        raise ValueError(f"the caches have {length} places, which are not whole blocks: use {whole_blocks(length)}")
    shape = (rows, kv_heads, splits, group)

    def of_head(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda row, head, split: (row, head, 0, 0))

    def of_split(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, None, *block), lambda row, head, split: (row, head, split, *(0 for _ in block))
        )

    of_row = pl.BlockSpec((1,), lambda row, head, split: (row,))
    numbers = [] if divided else [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, splits=splits, scale=scale, cap=cap),
            grid=(rows, kv_heads, splits),
            in_specs=[of_row, of_row, of_head(group, head_dim), of_head(head_dim, length), of_head(length, head_dim)],
            out_specs=[of_split(group, head_dim), *(of_split(group) for _ in numbers)],
            out_shape=[jax.ShapeDtypeStruct((*shape, head_dim), q.dtype if divided else jnp.float32), *numbers],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=interpret,
            name=NAME,
        )(first, end, q, k, v)
    )


def _kernel(
    first_ref: Any, end_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, mixed_ref: Any, *number_refs: Any,
    splits: int, scale: float, cap: float | None,
) -> None:  # fmt: skip
    """Of one row, one head of keys and values, and one split of the row's blocks of places."""
    from jax.experimental.pallas import triton

    queries, head_dim = q_ref.shape
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    first, end = first_ref[0], end_ref[0]
    low = first // BLOCK
    blocks = jnp.maximum(pl.cdiv(end, BLOCK) - low, 0)
    share = pl.cdiv(blocks, splits)
    begin = jnp.minimum(pl.program_id(2) * share, blocks)
    stop = jnp.minimum(begin + share, blocks)
    group = max(FEWEST_QUERIES, power_of_two(queries))
    every, there = pl.ds(0, group), jnp.arange(group) < queries
    q = triton.load(q_ref.at[every, :], mask=there[:, None], other=0.0)

    def block(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, top, total = state
        here, place = pl.ds(i * BLOCK, BLOCK), i * BLOCK + jnp.arange(BLOCK)
        scores = _capped(product(q, k_ref[:, here]) * scale, cap)
        scores = jnp.where(((place >= first) & (place < end))[None], scores, MASKED)
        higher = jnp.maximum(top, scores.max(axis=1))
        before, weights = jnp.exp(top - higher), jnp.exp(scores - higher[:, None])
        mixed = mixed * before[:, None] + product(weights.astype(v_ref.dtype), v_ref[here, :])
        return mixed, higher, total * before + weights.sum(axis=1)

    start = jnp.zeros((group, head_dim), jnp.float32), jnp.full(group, MASKED), jnp.zeros(group, jnp.float32)
    mixed, *numbers = lax.fori_loop(low + begin, low + stop, block, start)
    if not number_refs:
        mixed = mixed / jnp.maximum(numbers[1], SMALLEST)[:, None]
    triton.store(mixed_ref.at[every, :], mixed.astype(mixed_ref.dtype), mask=there[:, None])
    for ref, number in zip(number_refs, numbers, strict=bool(number_refs)):
        triton.store(ref.at[every], number, mask=there)
