"""Every field of the config changes something: the logits, the shapes of the parameters, the cache, or a file."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from es_jax.models.cache import KVCache
from es_jax.models.config import RopeScaling, TransformerConfig
from es_jax.models.families import weights_of
from es_jax.models.hf_config import to_hf
from es_jax.models.transformer import Transformer, param_shapes

pytestmark = pytest.mark.unchecked  # shapes are traced, where descriptions stand for arrays

SCALING = RopeScaling("llama3", 4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8)
BASE = TransformerConfig(
    family="gemma3_text", vocab_size=31, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=20,
    rope_scaling=SCALING, sliding_window=4, local_layers=(True, False), rope_layers=(True,), norm_plus_one=True,
)  # fmt: skip
# field → (another value, what it changes)
CHANGES = {
    "family": ("llama", "names"),
    "vocab_size": (32, "shapes"),
    "width": (12, "shapes"),
    "layers": (3, "shapes and cache"),
    "heads": (2, "shapes"),
    "kv_heads": (1, "shapes and cache"),
    "head_dim": (8, "shapes and cache"),
    "mlp_dim": (21, "shapes"),
    "rope_theta": (50.0, "logits"),
    "norm_eps": (1.0, "logits"),
    "qkv_bias": (True, "shapes"),
    "tied_embeddings": (False, "shapes"),
    "max_positions": (7, "config.json"),  # and what a run allows for prompts and completions: tests/training
    "rope_scaling": (None, "logits"),
    "rope_layers": ((True, False), "logits"),
    "sliding_window": (3, "logits"),
    "local_layers": ((False, True), "logits"),
    "local_rope_theta": (50.0, "logits"),
    "qk_norm": (True, "shapes"),
    "post_norms": (True, "shapes"),
    "norm_plus_one": (False, "logits"),
    "activation": ("gelu_tanh", "logits"),
    "scale_embeddings": (True, "logits"),
    "query_pre_attn_scalar": (2.0, "logits"),
    "attn_softcap": (1.0, "logits"),
    "final_softcap": (1.0, "logits"),
}
SCALING_CHANGES = {
    "kind": "linear",
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_positions": 16,
}


@functools.cache
def _params():
    shapes = jax.eval_shape(Transformer(BASE).init, jax.random.key(0))
    draw = np.random.RandomState(0)
    return jax.tree.map(lambda leaf: 0.5 * draw.standard_normal(leaf.shape).astype(np.float32), shapes)


@functools.cache
def _logits(config):
    tokens = np.random.RandomState(1).randint(0, 31, (1, 12)).astype(np.int32)
    return np.asarray(jax.jit(Transformer(config).apply)(_params(), tokens)[0])


def _cache_shape(config):
    return jax.eval_shape(lambda: KVCache.empty(config, 1, length=2, dtype=np.float32)).k.shape


def _assert_changes(changed, what):
    if what == "names":
        assert [row.hf for row in weights_of(changed)] != [row.hf for row in weights_of(BASE)]
    elif what == "config.json":
        plain = dataclasses.replace(BASE, family="llama", rope_scaling=None, sliding_window=None, norm_plus_one=False)
        assert to_hf(plain) != to_hf(dataclasses.replace(plain, max_positions=changed.max_positions))
    elif "shapes" in what:
        assert param_shapes(changed) != param_shapes(BASE)
        assert (_cache_shape(changed) != _cache_shape(BASE)) == ("cache" in what)
    else:
        assert param_shapes(changed) == param_shapes(BASE)
        assert float(np.abs(_logits(changed) - _logits(BASE)).max()) > 1e-3


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TransformerConfig)])
def test_every_field_changes_something(field):
    other, what = CHANGES[field]
    assert getattr(BASE, field) != other
    _assert_changes(dataclasses.replace(BASE, **{field: other}), what)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RopeScaling)])
def test_every_field_of_the_scaling_changes_the_logits(field):
    scaling = dataclasses.replace(SCALING, **{field: SCALING_CHANGES[field]})
    _assert_changes(dataclasses.replace(BASE, rope_scaling=scaling), "logits")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kv_heads": 3, "rope_theta": -1.0}, r"kv_heads = 3 must divide heads = 4.*rope_theta"),
        ({"sliding_window": 0}, r"sliding_window = 0 must be positive, or None"),
        ({"attn_softcap": -1.0, "final_softcap": 0.0}, r"attn_softcap = -1\.0.*final_softcap = 0\.0"),
        ({"rope_layers": ()}, r"rope_layers = \(\)"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
    ],
)
def test_problems_are_listed(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **fields)


def test_problems_of_the_scaling_are_listed():
    with pytest.raises(ValueError, match=r"unknown rope_scaling\.kind 'yarn'.*factor = 0 must.*high_freq_factor = 1"):
        RopeScaling("yarn", 0, high_freq_factor=1.0)
