"""Options scored after a prompt that is read once: equal to scoring each of them whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.generate.score import score_options, score_tokens
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    family="llama", vocab_size=23, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=24
)


def test_equals_scoring_every_option_whole():
    params = jax.tree.map(lambda x: 3 * x, jax.jit(Transformer(CONFIG).init)(jax.random.key(0)))
    draw = np.random.default_rng(0)
    rows = [
        (draw.integers(1, 23, length).tolist(), [draw.integers(1, 23, n).tolist() for n in sizes])
        for length, sizes in ((3, (1, 4, 2)), (40, (2, 2)), (32, (5,)), (1, (1, 1, 1, 3)))
    ]
    found = score_options(CONFIG, params, rows)
    assert [len(x) for x in found] == [3, 2, 1, 4]
    for (prompt, options), scores in zip(rows, found, strict=True):
        for option, score in zip(options, scores, strict=True):
            ids = jnp.zeros(48, jnp.int32).at[: len(prompt) + len(option)].set(jnp.array([*prompt, *option], jnp.int32))
            whole = score_tokens(CONFIG, params, ids[None], (jnp.arange(48) < len(prompt) + len(option))[None])
            assert score == pytest.approx(float(whole[0, len(prompt) :].sum()), abs=1e-4)
