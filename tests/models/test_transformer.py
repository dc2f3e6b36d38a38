"""The transformer's laws: padding, cache and unrolling change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.models.cache import KVCache
from es_jax.models.config import RopeScaling, TransformerConfig
from es_jax.models.layers import RMSNorm
from es_jax.models.transformer import Transformer, param_shapes, transpose_kernels, unstack_layers

LLAMA = TransformerConfig(
    family="llama", vocab_size=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=10, mlp_dim=40
)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tied_embeddings=False)
MIXED = dataclasses.replace(  # every flag at once; four kinds of layers
    QWEN2, family="gemma3_text", layers=4, sliding_window=3, local_layers=(True, False), local_rope_theta=50.0,
    rope_layers=(True, True, False), rope_scaling=RopeScaling("linear", 4.0), qk_norm=True, post_norms=True,
    norm_plus_one=True, activation="gelu_tanh", scale_embeddings=True, query_pre_attn_scalar=5, attn_softcap=2.0,
    final_softcap=3.0,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [LLAMA, MIXED], ids=["llama", "mixed"])


@functools.cache
def _setup(config):
    params = jax.tree.map(lambda x: x * jnp.float32(4), jax.jit(Transformer(config).init)(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    return Transformer(config), params, tokens


@functools.cache
def _apply(config):
    return jax.jit(Transformer(config).apply)


def _close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5)


def _positions(start, stop):
    return jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32)[None], (2, stop - start))


@CONFIGS
@pytest.mark.parametrize("stacked", [True, False])
def test_cache_equals_no_cache(config, stacked):
    model, params, tokens = _setup(config)
    whole, none = _apply(model.config)(params, tokens)
    assert none is None
    params = params if stacked else unstack_layers(params)
    cache = KVCache.empty(config, 2, length=12, dtype=jnp.float32, stacked=stacked)
    step = _apply(config)
    first, cache = step(params, tokens[:, :4], positions=_positions(0, 4), cache=cache)
    _close(first, whole[:, :4])
    for t in range(4, 9):
        logits, cache = step(params, tokens[:, t : t + 1], positions=_positions(t, t + 1), cache=cache)
        _close(logits[:, 0], whole[:, t])
    assert int(cache.index) == 9
    assert cache.positions[0].tolist() == [*range(9), -1, -1, -1]


@CONFIGS
def test_unrolled_equals_scanned_with_kernels_either_way_round(config):
    model, params, tokens = _setup(config)
    expected = _apply(model.config)(params, tokens)[0]
    apart = unstack_layers(params)
    for given in (apart, transpose_kernels(apart, itemsize=4)):
        _close(_apply(model.config)(given, tokens)[0], expected)


@CONFIGS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(config, side):
    model, params, tokens = _setup(config)
    short = _apply(model.config)(params, tokens[:1, :5])[0]
    pad, held = jnp.full((1, 4), 7, jnp.int32), _positions(0, 5)[:1]
    none = jnp.full((1, 4), -1, jnp.int32)
    order = (lambda a, b: (b, a)) if side == "left" else (lambda a, b: (a, b))
    padded = jnp.concatenate(order(tokens[:1, :5], pad), axis=1)
    positions = jnp.concatenate(order(held, none), axis=1)
    both = jnp.concatenate([padded, tokens[1:]]), jnp.concatenate([positions, _positions(0, 9)[1:]])
    start = 4 if side == "left" else 0
    cache = KVCache.empty(config, 2, length=10, dtype=jnp.float32)
    for given in (None, cache):
        logits, after = _apply(model.config)(params, both[0], positions=both[1], cache=given)
        assert bool(jnp.isfinite(logits).all())
        _close(logits[:1, start : start + 5], short)
        _close(logits[1:], _apply(model.config)(params, tokens[1:])[0])
    # and the next token of the padded row sees its own prompt, whatever its slots
    following = tokens[:, :1]
    logits, _ = _apply(model.config)(params, following, positions=jnp.array([[5], [9]], jnp.int32), cache=after)
    alone = _apply(model.config)(params, jnp.concatenate([tokens[:1, :5], following[:1]], axis=1))[0]
    _close(logits[0, 0], alone[0, -1])


def test_the_window_ends_where_it_says():
    """With one layer, a change of token p reaches the logits of p … p + window - 1 and no further."""
    config = dataclasses.replace(LLAMA, layers=1, sliding_window=3)
    _, params, tokens = _setup(config)
    changed = tokens.at[0, 2].set((tokens[0, 2] + 1) % config.vocab_size)
    before, after = (_apply(config)(params, t)[0][0] for t in (tokens, changed))
    assert jnp.any(before != after, axis=-1).tolist() == [False, False, True, True, True, False, False, False, False]


@CONFIGS
def test_trace_follows_the_stream(config):
    model, params, tokens = _setup(config)
    stream = jax.jit(model.trace)(params, tokens)
    assert len(stream) == config.layers + 1
    scanned = _apply(config)(params, tokens)[0]
    norm = RMSNorm(config).apply({"params": params["final_norm"]}, stream[-1])
    _close(model.logits(params, norm), scanned)


@CONFIGS
def test_logits_at_picks_one_token_a_row(config):
    model, params, tokens = _setup(config)
    whole = _apply(model.config)(params, tokens)[0]
    picked, _ = _apply(model.config)(params, tokens, logits_at=jnp.array([3, 8]))
    _close(picked, jnp.stack([whole[0, 3], whole[1, 8]]))


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
    model, params, tokens = _setup(LLAMA)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert model.hidden(half, tokens)[0].dtype == jnp.bfloat16
    logits, whole = _apply(model.config)(half, tokens)[0], _apply(model.config)(params, tokens)[0]
    assert logits.dtype == jnp.float32
    assert float(jnp.abs(logits - whole).max()) < 0.1 * float(jnp.abs(whole).max())


def test_param_shapes_and_dtype():
    shapes = param_shapes(QWEN2)
    assert shapes["layers/attn/k/kernel"] == (3, 24, 20)
    assert shapes["layers/attn/o/kernel"] == (3, 40, 24)
    assert shapes["head/kernel"] == (24, 61)
    assert len(shapes) == 15 and len(param_shapes(LLAMA)) == 11 and len(param_shapes(MIXED)) == 19
    params = jax.eval_shape(lambda key: Transformer(LLAMA).init(key, dtype=jnp.bfloat16), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_errors_name_the_field_and_the_remedy():
    with pytest.raises(ValueError, match=r"kv_heads = 3 must divide heads = 4.*rope_theta"):
        dataclasses.replace(LLAMA, kv_heads=3, rope_theta=-1.0)
    model, params, tokens = _setup(LLAMA)
    cache = KVCache.empty(LLAMA, 2, length=8, dtype=jnp.float32)
    with pytest.raises(ValueError, match="positions = None with a cache"):
        model.apply(params, tokens, cache=cache)
    with pytest.raises(ValueError, match="cache length = 8 is too short"):
        model.apply(params, tokens, positions=_positions(0, 9), cache=cache)
    with pytest.raises(ValueError, match="stacked=False"):
        model.apply(unstack_layers(params), tokens[:, :2], positions=_positions(0, 2), cache=cache)
