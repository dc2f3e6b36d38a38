"""Log-probabilities of several continuations of one prompt: the prompt is read once."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32

from es_jax.core.chunked_map import block_length, in_blocks
from es_jax.core.mesh import replicated
from es_jax.models.cache import KVCache
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer

TOKENS = 2**12  # of prompts read in one call
WIDTH_STEP = 32  # prompts are padded to this many tokens times 1, 2, 3, 4, 6, 8, 12, …, so that few widths are compiled


def score_options(
    config: TransformerConfig,
    params: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """log p(option | prompt) of every option, the sum over its tokens: an array [K] for each row.

    Args:
      config, params: the model; it computes in the dtype of the parameters.
      rows: (prompt, options) as token ids, at least one of each; rows may have different numbers of options.
      mesh: of the parameters, where they are cut over the devices of several processes.

    >>> config = TransformerConfig(family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1,
    ...                            head_dim=4, mlp_dim=8)
    >>> params = Transformer(config).init(jax.random.key(0))
    >>> [x.shape for x in score_options(config, params, [([1, 2], [[3], [4, 5]]), ([6], [[7]])])]
    [(2,), (1,)]
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    longest = max(len(ids) for _, options in rows for ids in options)
    most = max(len(options) for _, options in rows)
    for mine, width in _together([len(prompt) for prompt, _ in rows]):
        count = min(max(TOKENS // width, 1), _power(len(mine)))
        for first in range(0, len(mine), count):
            chosen = mine[first : first + count]
            prompts, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
            options, ends = np.zeros((most, count, longest), np.int32), np.zeros((most, count), np.int32)
            for r, i in enumerate(chosen):
                prompts[r, : len(rows[i][0])], lengths[r] = rows[i][0], len(rows[i][0])
                for k, ids in enumerate(rows[i][1]):
                    options[k, r, : len(ids)], ends[k, r] = ids, len(ids)
            total = np.asarray(_score(config, mesh, params, prompts, lengths, options, ends))
            for r, i in enumerate(chosen):
                found[i] = total[: len(rows[i][1]), r]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: TransformerConfig,
    mesh: Mesh | None,
    params: Any,
    prompts: Int32[Array, "B P"],
    lengths: Int32[Array, " B"],
    options: Int32[Array, "K B T"],
    ends: Int32[Array, "K B"],
) -> Float32[Array, "K B"]:
    model, (rows, width) = Transformer(config), prompts.shape
    dtype, places = params["embed"]["embedding"].dtype, jnp.arange(width, dtype=jnp.int32)[None]
    empty = functools.partial(KVCache.empty, config, rows, dtype=dtype)
    positions = jnp.where(places < lengths[:, None], places, -1)
    hidden, read = model.hidden(params, prompts, positions=positions, cache=empty(length=width))
    assert read is not None
    last, past = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1), (read.as_past(),)

    def one(option: tuple[Array, Array]) -> Array:
        tokens, end = option
        place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        there = place < end[:, None]
        at = jnp.where(there, lengths[:, None] + place, -1)
        hidden, _ = model.hidden(params, tokens, positions=at, cache=empty(length=tokens.shape[1], past=past))
        before = jnp.concatenate([last, hidden[:, :-1]], axis=1)
        logprob = in_blocks(chosen, before, tokens, block=block_length(rows * config.vocab_size))
        return jnp.sum(jnp.where(there, logprob, 0.0), axis=1)

    def chosen(before: Array, tokens: Array) -> Array:
        logits = model.logits(params, before)
        return jnp.take_along_axis(logits, tokens[..., None], axis=2)[..., 0] - jax.nn.logsumexp(logits, axis=2)

    total = jax.lax.map(one, (options, ends))
    return total if mesh is None else jax.lax.with_sharding_constraint(total, replicated(mesh))


def _together(lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Rows of about one length, and the width that they are padded to."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(WIDTH_STEP * _rounded(-(-length // WIDTH_STEP)), []).append(i)
    yield from ((group, width) for width, group in groups.items())


def _rounded(n: int) -> int:
    """The smallest number that is at least n and a power of two, or three times one."""
    power = _power(n)
    return 3 * power // 4 if power >= 4 and n <= 3 * power // 4 else power


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
