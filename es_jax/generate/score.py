"""Log-probabilities of given tokens, in one forward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer


@functools.partial(jax.jit, static_argnums=0)
def score_tokens(
    config: TransformerConfig, params: Any, tokens: Int32[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float32[Array, "B L"]:
    """log p(tokenₗ | the row's tokens before it), float32 [B, L].

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
    mask = mask.astype(bool)
    positions = jnp.where(mask, jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, -1)
    logits, _ = Transformer(config).apply(params, tokens, positions=positions)
    before = jnp.roll(logits, 1, axis=1)
    logprob = jnp.take_along_axis(before, tokens[..., None], axis=2)[..., 0] - jax.nn.logsumexp(before, axis=2)
    return jnp.where(positions > 0, logprob, 0.0)
