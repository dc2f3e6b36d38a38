"""GGUF files of every family: metadata to config, tensors in GGUF's layout to parameters."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from es_jax.core.tree import named_leaves
from es_jax.models.config import RopeScaling
from es_jax.models.families import FAMILIES, weights_of
from es_jax.models.hf_config import from_hf
from es_jax.models.rope import rope_frequencies
from es_jax.models.transformer import Transformer
from es_jax.weights.convert import to_params
from es_jax.weights.gguf import GGUFReader, from_gguf

pytestmark = pytest.mark.unchecked  # a file is stood in for by its contents

BASE = {
    "vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 10, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
NAMES = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim", "rope.dimension_count": "head_dim",
    "feed_forward_length": "intermediate_size", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
WINDOW = {"attention.sliding_window": 7}
# GGUF's fields of a family, and the same in config.json
PARTICULARS = {
    "llama": ({}, {}),
    "mistral": (WINDOW, {"sliding_window": 7}),
    "qwen2": ({"rope.freq_base": 1e6}, {"rope_theta": 1e6}),
    "qwen3": ({"rope.freq_base": 1e6}, {"rope_theta": 1e6}),
    "gemma2": (
        WINDOW | {"attn_logit_softcapping": 40.0},
        {"sliding_window": 7, "attn_logit_softcapping": 40.0, "query_pre_attn_scalar": 6},
    ),
    "gemma3_text": (
        WINDOW | {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {"sliding_window": 7, "query_pre_attn_scalar": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "smollm3": ({"rope.freq_base": 5e6}, {"rope_theta": 5e6}),
}


class File(GGUFReader):
    """A GGUF file in memory."""

    path = Path("model.gguf")

    def __init__(self, family, fields, tensors):
        architecture = FAMILIES[family].gguf_architecture
        self.metadata = {"general.architecture": architecture}
        self.metadata |= {f"{architecture}.{key}": BASE[ours] for key, ours in NAMES.items()}
        self.metadata |= {f"{architecture}.{key}": value for key, value in fields.items()}
        self.tensors = {"token_embd.weight": np.zeros((13, 16), np.float32), **tensors}
        self.shapes = {key: tensor.shape for key, tensor in self.tensors.items()}

    def read(self, key, start=0, stop=None):
        return self.tensors[key][start:stop]


def interleaved(rows, heads):
    """GGUF's order of rotary rows, as its specification gives it: halves of each head dealt out in turn."""
    size = rows.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def in_gguf_layout(config, params):
    leaves = dict(named_leaves(params))
    tensors = {}
    for row in weights_of(config):
        stacked = row.path.startswith("layers/")
        for layer in range(config.layers) if stacked else (None,):
            tensor = np.asarray(leaves[row.path] if layer is None else leaves[row.path][layer])
            tensor = tensor.T if row.transpose else tensor
            if row.rotary and FAMILIES[config.family].gguf_permuted:
                tensor = interleaved(tensor, getattr(config, row.rotary))
            if config.family.startswith("gemma") and row.path.endswith("norm/scale"):
                tensor = tensor + np.float32(1)
            tensors[row.gguf.format(layer)] = tensor
    return tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_metadata_and_tensors(name):
    theirs, same = PARTICULARS[name]
    expected = from_hf({**BASE, "model_type": name, **same, "tie_word_embeddings": True})
    shapes = jax.eval_shape(Transformer(expected).init, jax.random.key(0))
    draw = np.random.RandomState(0)
    params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape).astype(np.float32), shapes)
    file = File(name, theirs, in_gguf_layout(expected, params))
    assert from_gguf(file) == expected
    loaded = to_params(file, expected, naming="gguf")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-7), loaded, params)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_from_its_divisors(factor):
    plain = dataclasses.replace(from_gguf(File("llama", {"rope.freq_base": 5e5}, {})), head_dim=6)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling("llama3", factor))
    divisors = rope_frequencies(plain) / rope_frequencies(scaled)
    file = File("llama", {"rope.freq_base": 5e5}, {"rope_freqs.weight": divisors})
    assert from_gguf(file).rope_scaling == RopeScaling("llama3", factor)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight does not scale rotary positions like"):
        from_gguf(File("llama", {"rope.freq_base": 5e5}, {"rope_freqs.weight": divisors * np.float32(1.5)}))


@pytest.mark.parametrize(
    "name, field",
    [
        ("llama", {"rope.scaling.type": "yarn"}),
        ("llama", {"expert_count": 8}),
        ("llama", {"novelty": 1}),
        ("llama", {"attn_logit_softcapping": 30.0}),
        ("qwen2", {"attention.sliding_window": 128}),
        ("gemma2", {"attention.sliding_window": 0}),
        ("gemma3_text", {"rope.dimension_count_swa": 4}),
        ("llama", {"feed_forward_length": [1, 2]}),
    ],
)
def test_refused_by_name(name, field):
    with pytest.raises(ValueError, match=next(iter(field)).replace(".", r"\.")):
        from_gguf(File(name, PARTICULARS[name][0] | field, {}))


def test_a_wide_gemma_divides_by_width_over_heads():
    assert from_gguf(File("gemma2", WINDOW | {"block_count": 46}, {})).query_pre_attn_scalar == 16 // 4
