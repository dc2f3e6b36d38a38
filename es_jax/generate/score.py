"""Log-probabilities of given tokens, in one forward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from es_jax.core.chunked_map import block_length, in_blocks
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer


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

    logprob = in_blocks(score, jnp.roll(hidden, 1, axis=1), tokens, block=block_length(len(tokens) * config.vocab_size))
    return jnp.where(positions > 0, logprob, 0.0)


def token_positions(mask: Bool[Array, "B L"]) -> Int32[Array, "B L"]:
    """0, 1, 2, … over the tokens of each row that are there, −1 at padding.

    >>> token_positions(jnp.array([[False, True, True]])).tolist()
    [[-1, 0, 1]]
    """
    mask = mask.astype(bool)
    return jnp.where(mask, jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, -1)
