"""How far a model's next-token distribution has moved from the base model's: KL(base ‖ now), by two estimators.

The published estimator (arXiv 2605.30148): the base model writes one continuation per prompt, and log p_base − log
p_now is averaged over its tokens. The exact one: the sum over the vocabulary at the same positions, which is the
conditional expectation of the former.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from es_jax.core import processes, rng
from es_jax.core.chunked_map import block_length, ceil_div, in_blocks
from es_jax.generate.engine import engine_for
from es_jax.generate.prompts import TokenLists
from es_jax.generate.sampling import Temperature
from es_jax.generate.score import token_positions
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer

WIDTH = 64  # prompts with continuations are padded to a multiple of this many tokens
TOKENS = 2**12  # rows of one forward pass


@functools.partial(jax.jit, static_argnums=0)
def token_kl(
    config: TransformerConfig, base: Any, now: Any, tokens: Int32[Array, "B L"], mask: Bool[Array, "B L"]
) -> tuple[Float32[Array, "B L"], Float32[Array, "B L"]]:
    """(log p_base − log p_now of the token, KL over the vocabulary at its position), each [B, L], in nats; 0 at padding
    and at each row's first token.

    `mask` marks the tokens that are not padding. Both distributions are in memory for one block of positions at a time.

    >>> config = TransformerConfig(family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1,
    ...                            head_dim=4, mlp_dim=8)
    >>> params = Transformer(config).init(jax.random.key(0))
    >>> sampled, exact = token_kl(config, params, params, jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool))
    >>> float(jnp.abs(exact).max())
    0.0
    """
    model, positions = Transformer(config), token_positions(mask)
    before = [jnp.roll(model.hidden(params, tokens, positions=positions)[0], 1, axis=1) for params in (base, now)]

    def compare(of_base, of_now, tokens):
        p = jax.nn.log_softmax(model.logits(base, of_base))
        difference = p - jax.nn.log_softmax(model.logits(now, of_now))
        chosen = jnp.take_along_axis(difference, tokens[..., None])[..., 0]
        return chosen, jnp.sum(jnp.exp(p) * difference, axis=2)

    compared = in_blocks(compare, *before, tokens, block=block_length(2 * len(tokens) * config.vocab_size))
    return jax.tree.map(lambda x: jnp.where(positions > 0, x, 0.0), compared)


def sample(
    config: TransformerConfig,
    base: Any,
    prompts: TokenLists,
    *,
    stop_token_ids: Sequence[int],
    slots: int,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[int]]:
    """One continuation of every prompt at temperature 1: 1 to max_new_tokens token ids, including the stop token. With
    one seed, row i does not depend on the other rows."""
    engine = engine_for(
        config, prompts, slots=slots, stop_token_ids=stop_token_ids, sampler=Temperature(1.0),
        max_new_tokens=min(max_new_tokens, config.max_positions - max(map(len, prompts))),
    )  # fmt: skip
    tokens, length, _ = engine.generate(base, prompts, key=rng.sampling_key(seed, 0))
    return [row[:n].tolist() for row, n in zip(np.asarray(tokens), np.asarray(length), strict=True)]


def kl(
    config: TransformerConfig, base: Any, now: Any, prompts: TokenLists, continuations: TokenLists
) -> dict[str, Any]:
    """KL(base ‖ now) on continuations of the prompts, in nats per token, with standard errors over prompts.

    Returns:
      n prompts and the number of tokens; kl, kl_se: the published estimate, the mean over prompts of each prompt's mean
        over its tokens; kl_token, kl_token_se: the mean over all tokens (a ratio, with a linearised error); kl_exact, …
        and kl_exact_token, …: the same for the sum over the vocabulary. For a single prompt the errors are None.

    Raises ValueError if the KL of a prompt is not finite.
    """
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, continuations, strict=True)]
    starts, lengths = np.array([[len(ids)] for ids in prompts]), np.array([*map(len, continuations)])
    ends = starts + lengths[:, None]
    width = ceil_div(int(ends.max()), WIDTH) * WIDTH
    count = max(min(TOKENS // width, len(rows)), 1)
    sums: list[list[float]] = []  # for each prompt, by both estimators
    for first in range(0, len(rows), count):
        batch = slice(first, first + count)
        mask = np.arange(width) < ends[batch]
        tokens = np.zeros(mask.shape, np.int32)
        tokens[mask] = np.concatenate(rows[batch])
        absent = ((0, count - len(mask)), (0, 0))  # empty rows of a last batch
        estimates = processes.fetch(token_kl(config, base, now, np.pad(tokens, absent), np.pad(mask, absent)))
        written = mask & (np.arange(width) >= starts[batch])
        sums += [[x[r][positions].astype(np.float64).sum() for x in estimates] for r, positions in enumerate(written)]
    if wrong := [i for i, own in enumerate(sums) if not np.isfinite(own).all()]:
        raise ValueError(
            f"KL is not finite for {len(wrong)} of {len(rows)} prompts: prompt {wrong[0]}, counted from 0, has "
            f"{np.array(sums[wrong[0]]).tolist()} by the two estimators; compute in float32 or bfloat16, or use other "
            "weights"
        )
    sampled, exact = np.array(sums).T
    facts = {"n": len(rows), "tokens": int(lengths.sum())}
    return facts | averages("kl", sampled, lengths) | averages("kl_exact", exact, lengths)


def averages(name: str, sums: np.ndarray, lengths: np.ndarray) -> dict[str, float | None]:
    """Both means of per-prompt sums [n] over lengths [n], with their standard errors.

    >>> averages("kl", np.array([1.0, 4.0]), np.array([1.0, 2.0]))["kl"]
    1.5
    """
    n, each, mean = len(sums), sums / lengths, float(np.divide(sums.sum(), lengths.sum()))
    se = token_se = None
    if n > 1:
        rest = sums - mean * lengths
        se = float(each.std(ddof=1) / math.sqrt(n))
        token_se = float(math.sqrt((rest**2).sum() * n / (n - 1)) / lengths.sum())
    return {name: float(each.mean()), f"{name}_se": se, f"{name}_token": mean, f"{name}_token_se": token_se}
