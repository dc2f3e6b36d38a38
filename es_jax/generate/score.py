"""Log-probabilities of given tokens: of whole rows, in one forward pass, and of several continuations of one prompt."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32

from es_jax.core.chunked_map import block_length, ceil_div, in_blocks, power_of_two
from es_jax.core.mesh import replicated
from es_jax.generate.sampling import Greedy
from es_jax.models.cache import KVCache
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer

BATCH_TOKENS = 2**12  # of prompts, or of options, read in one call of `score_options`
WIDTH_STEP = 32  # its prompts are padded to this times 1, 2, 3, 4, 6, 8, 12, …, so that few widths are compiled

Rows = Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]  # (prompt, options) as token ids


def token_logprobs(logits: Float[Array, "*b V"], tokens: Int32[Array, "*b"]) -> Float[Array, "*b"]:
    """log p(token) under softmax(logits), for each of the tokens."""
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def _hidden_logprobs(model: Transformer, params: Any, hidden: Array, tokens: Array) -> Float32[Array, "B T"]:
    """log p(token) given what the model computed before it. [B, T, V] is never in memory, nor in a gradient's."""
    score = lambda hidden, tokens: token_logprobs(model.logits(params, hidden), tokens)  # noqa: E731
    return in_blocks(score, hidden, tokens, block=block_length(len(tokens) * model.config.vocab_size))


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
    model, positions = Transformer(config), token_positions(mask)
    hidden, _ = model.hidden(params, tokens, positions=positions)
    logprob = _hidden_logprobs(model, params, jnp.roll(hidden, 1, axis=1), tokens)
    return jnp.where(positions > 0, logprob, 0.0)


def token_positions(mask: Bool[Array, "B L"]) -> Int32[Array, "B L"]:
    """0, 1, 2, … over the tokens of each row that are there, −1 at padding."""
    return jnp.where(mask, jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, -1)


def score_options(
    config: TransformerConfig,
    params: Any,
    rows: Rows,
    *,
    mesh: Mesh | None = None,
    names: Sequence[str] = (),
) -> list[np.ndarray]:
    """log p(option | prompt) of every option, the sum over its tokens: an array [K] for each row.

    Args:
      config, params: the model; it computes in the dtype of the parameters.
      rows: (prompt, options) as token ids, at least one of each; rows may have different numbers of options.
      mesh: of the parameters, where they are cut over the devices of several processes.
      names: of the rows, for messages; their numbers, from 0, by default.

    Raises:
      ValueError: one is NaN or infinite, by which an option would win or lose; its row is named.

    >>> config = TransformerConfig(family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1,
    ...                            head_dim=4, mlp_dim=8)
    >>> params = Transformer(config).init(jax.random.key(0))
    >>> [x.shape for x in score_options(config, params, [([1, 2], [[3], [4, 5]]), ([6], [[7]])])]
    [(2,), (1,)]
    """
    longest = max(len(ids) for _, options in rows for ids in options)
    most = max(len(options) for _, options in rows)
    return [own.logprob for own in _scored(config, params, rows, mesh, names, longest, most)]


class OptionScores(NamedTuple):
    """Of a prompt's K options: log p(option | prompt), and whether greedy decoding would write the option."""

    logprob: np.ndarray  # float32 [K]
    greedy: np.ndarray  # bool [K]


def score_continuations(
    config: TransformerConfig,
    params: Any,
    rows: Rows,
    *,
    names: Sequence[str] = (),
    done: Callable[[int], None] = lambda options: None,
) -> list[OptionScores]:
    """As `score_options`, of rows whose options may differ much in number and length, and with what is greedy.

    Rows that are alike are computed together. Prompt and option may have one token more than the model's context, for
    the last one is not fed. `done` is called with how many more options are scored.

    >>> config = TransformerConfig(family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1,
    ...                            head_dim=4, mlp_dim=8)
    >>> params = Transformer(config).init(jax.random.key(0))
    >>> [own.greedy.shape for own in score_continuations(config, params, [([1, 2], [[3], [4, 5]]), ([6], [[7]])])]
    [(2,), (1,)]
    """
    alike = defaultdict(list)
    for i, (_, options) in enumerate(rows):
        alike[_rounded(max(map(len, options))), _rounded(len(options))].append(i)
    scores: dict[int, OptionScores] = {}
    for (longest, most), members in alike.items():
        own, named = [rows[i] for i in members], [names[i] if names else str(i) for i in members]
        scores |= zip(members, _scored(config, params, own, None, named, longest, most), strict=True)
        done(sum(len(options) for _, options in own))
    return [scores[i] for i in range(len(rows))]


def _scored(
    config: TransformerConfig,
    params: Any,
    rows: Rows,
    mesh: Mesh | None,
    names: Sequence[str],
    longest: int,
    most: int,
) -> list[OptionScores]:
    """The scores of rows of up to `most` options of up to `longest` tokens."""
    scores = [OptionScores(np.zeros(0), np.zeros(0, bool))] * len(rows)
    alike = defaultdict(list)  # rows of about one length, by the width that they are padded to
    for i, (prompt, _) in enumerate(rows):
        alike[WIDTH_STEP * _rounded(ceil_div(len(prompt), WIDTH_STEP))].append(i)
    for width, members in alike.items():
        count = min(max(BATCH_TOKENS // max(width, longest), 1), power_of_two(len(members)))
        for first in range(0, len(members), count):
            batch = members[first : first + count]
            prompts, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
            options, ends = np.zeros((most, count, longest), np.int32), np.zeros((most, count), np.int32)
            for r, (prompt, continuations) in enumerate(rows[i] for i in batch):
                prompts[r, : len(prompt)], lengths[r] = prompt, len(prompt)
                for k, ids in enumerate(continuations):
                    options[k, r, : len(ids)], ends[k, r] = ids, len(ids)
            total, greedy = map(np.asarray, _score(config, mesh, params, prompts, lengths, options, ends))
            for r, i in enumerate(batch):
                own = slice(len(rows[i][1])), r
                scores[i] = OptionScores(total[own], greedy[own])
    if wrong := [i for i, own in enumerate(scores) if not np.isfinite(own.logprob).all()]:
        raise ValueError(
            f"log-probabilities of options are not finite in {len(wrong)} of {len(rows)} rows: row "
            f"{names[wrong[0]] if names else wrong[0]} has {scores[wrong[0]].logprob.tolist()}; compute in float32 or "
            "bfloat16, or take other weights"
        )
    return scores


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: TransformerConfig,
    mesh: Mesh | None,
    params: Any,
    prompts: Int32[Array, "B P"],
    lengths: Int32[Array, " B"],
    options: Int32[Array, "K B T"],
    ends: Int32[Array, "K B"],
) -> tuple[Float32[Array, "K B"], Bool[Array, "K B"]]:
    model, (rows, width) = Transformer(config), prompts.shape
    places = jnp.arange(width, dtype=jnp.int32)[None]
    positions = jnp.where(places < lengths[:, None], places, -1)
    hidden, read = model.hidden(params, prompts, positions=positions, cache=model.empty_cache(params, rows, width))
    assert isinstance(read, KVCache)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)

    def one(option: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens, end = option
        place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        there = place < end[:, None]
        at = jnp.where(place + 1 < end[:, None], lengths[:, None] + place, -1)  # nothing follows the last one
        cache = model.empty_cache(params, rows, tokens.shape[1], past=(read,))
        hidden, _ = model.hidden(params, tokens, positions=at, cache=cache)
        before = jnp.concatenate([last, hidden[:, :-1]], axis=1)
        logprob, likeliest = _hidden_choices(model, params, before, tokens)
        return jnp.sum(jnp.where(there, logprob, 0.0), axis=1), jnp.all(likeliest | ~there, axis=1)

    scores = jax.lax.map(one, (options, ends))
    return scores if mesh is None else jax.lax.with_sharding_constraint(scores, replicated(mesh))


def _hidden_choices(model: Transformer, params: Any, hidden: Array, tokens: Array) -> tuple[Array, Array]:
    """As `_hidden_logprobs`, and whether each token is the one that greedy decoding takes, bool [B, T]."""
    greedy = jax.vmap(jax.vmap(lambda logits: Greedy()(logits, None)))

    def score(hidden: Array, tokens: Array) -> tuple[Array, Array]:
        logits = model.logits(params, hidden)
        return token_logprobs(logits, tokens), greedy(logits) == tokens

    return in_blocks(score, hidden, tokens, block=block_length(len(tokens) * model.config.vocab_size))


def _rounded(n: int) -> int:
    """The smallest number that is at least n and a power of two, or three times one."""
    power = power_of_two(n)
    return 3 * power // 4 if n <= 3 * power // 4 else power
