"""Attention of a long prompt goes through blocks of queries, which changes nothing but the memory that it takes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core import chunked_map
from es_jax.models import layers
from es_jax.models.cache import KVCache
from es_jax.models.transformer import Transformer
from tests.models.test_transformer import CONFIGS

T = 22


@pytest.fixture
def few(monkeypatch):
    """Blocks of eight queries, three for T."""
    monkeypatch.setattr(layers, "QUERIES", 8)
    monkeypatch.setattr(chunked_map, "HELD", 1)


def _inputs(config):
    params = jax.tree.map(lambda x: x * jnp.float32(4), jax.jit(Transformer(config).init)(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, config.vocab_size)
    place = jnp.arange(T, dtype=jnp.int32)
    return params, tokens, jnp.stack([place, jnp.where(place < 13, place, -1)])  # the second row is shorter


@CONFIGS
@pytest.mark.parametrize("cached", [False, True])
def test_blocks_change_neither_logits_nor_gradients(config, cached, few, monkeypatch):
    params, tokens, positions = _inputs(config)
    cache = KVCache.empty(config, 2, length=T + 3, dtype=jnp.float32) if cached else None

    def loss(params):
        logits = Transformer(config).apply(params, tokens, positions=positions, cache=cache)[0]
        return jnp.sum(jnp.where(positions[..., None] >= 0, jnp.sin(logits), 0)), logits

    def both():
        return jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(params))(params)

    (_, blocked), gradient = both()
    monkeypatch.setattr(chunked_map, "HELD", 2**25)
    (_, whole), expected = both()
    there = np.asarray(positions >= 0)
    np.testing.assert_allclose(np.asarray(blocked)[there], np.asarray(whole)[there], atol=2e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-2), gradient, expected)


@CONFIGS
def test_the_scores_of_all_queries_are_never_held(config, few, monkeypatch):
    """Neither forwards nor backwards has the program an array of B · H · T · T numbers."""
    params, tokens, positions = _inputs(config)

    def largest():
        program = jax.make_jaxpr(
            jax.grad(lambda params: Transformer(config).apply(params, tokens, positions=positions)[0].sum())
        )(params)
        shapes = re.findall(r"f32\[([\d,]+)\]", str(program))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes if shape.endswith((f",{T}", ",8")))

    scores = 2 * config.heads * T * T
    blocked = largest()
    monkeypatch.setattr(chunked_map, "HELD", 2**25)
    assert blocked < scores <= largest()
