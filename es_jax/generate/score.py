"""Log-probabilities of given tokens, in one forward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer

_HELD = 2**25  # logits held at once, in numbers: 128 MiB of float32


@functools.partial(jax.jit, static_argnums=0)
def score_tokens(
    config: TransformerConfig, params: Any, tokens: Int32[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float32[Array, "B L"]:
    """log p(tokenₗ | the row's tokens before it), float32 [B, L].

    The logits are made for a block of positions at a time, so that [B, L, V] is never held, nor by a gradient.

    Args:
      config, params: the model; it computes in the dtype of the parameters.
      tokens: int32 [B, L].
      mask: which tokens are there. Padding may stand on either side of a row. It is neither attended nor scored.

    Returns:
      0 at padding and at each row's first token, which has nothing before it.

    >>> config = TransformerConfig(family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1,
    ...                            head_dim=4, mlp_dim=8)
    >>> params = Transformer(config).init(jax.random.key(0))
    >>> score_tokens(config, params, jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool)).shape
    (1, 3)
    """
    model, positions = Transformer(config), token_positions(mask)
    hidden, _ = model.hidden(params, tokens, positions=positions)

    def score(hidden, tokens):
        logits = model.logits(params, hidden)
        return jnp.take_along_axis(logits, tokens[..., None], axis=2)[..., 0] - jax.nn.logsumexp(logits, axis=2)

    logprob = in_blocks(score, jnp.roll(hidden, 1, axis=1), tokens, block=block_length(config, len(tokens)))
    return jnp.where(positions > 0, logprob, 0.0)


def token_positions(mask: Bool[Array, "B L"]) -> Int32[Array, "B L"]:
    """0, 1, 2, … over the tokens of each row that are there, −1 at padding.

    >>> token_positions(jnp.array([[False, True, True]])).tolist()
    [[-1, 0, 1]]
    """
    mask = mask.astype(bool)
    return jnp.where(mask, jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, -1)


def block_length(config: TransformerConfig, rows: int) -> int:
    """How many positions of `rows` rows are in a block whose logits take about 128 MiB; at least 1."""
    return max(_HELD // (rows * config.vocab_size), 1)


def in_blocks(function: Callable, *arrays: Array, block: int) -> Any:
    """`function` of arrays [B, L, …], called on blocks of positions [B, block, …] one after another.

    What it makes inside is held for one block, forwards and backwards. It returns a tree of arrays [B, block, …].

    >>> in_blocks(lambda x: 2 * x, jnp.arange(5)[None], block=2).tolist()
    [[0, 2, 4, 6, 8]]
    """
    length = arrays[0].shape[1]
    count = -(-length // block)
    if count == 1:
        return function(*arrays)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, count * block - length if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * block, *x.shape[3:])[:, :length]

    out = jax.lax.map(lambda xs: jax.checkpoint(function)(*xs), tuple(map(cut, arrays)))
    return jax.tree.map(join, out)
