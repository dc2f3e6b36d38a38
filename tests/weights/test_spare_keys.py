"""Keys that repeat what the config says already are accepted when they do, and only then."""

import dataclasses

import jax
import numpy as np
import pytest

from es_jax.models.config import RopeScaling, TransformerConfig
from es_jax.models.families import weights_of
from es_jax.models.rope import rope_frequencies
from es_jax.models.transformer import param_shapes
from es_jax.weights.convert import to_params

CONFIG = TransformerConfig(
    family="gemma3_text", vocab_size=9, width=8, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=6,
    rope_theta=1e6, local_rope_theta=50.0, sliding_window=3, local_layers=(True, False),
)  # fmt: skip


class Tensors(dict):
    @property
    def shapes(self):
        return {key: tensor.shape for key, tensor in self.items()}

    def read(self, key, start=0, stop=None):
        return self[key][start:stop]


def tensors(config, naming, **more):
    shapes, result = param_shapes(config), Tensors(**more)
    for row in weights_of(config):
        stacked = row.path.startswith("layers/")
        shape = shapes[row.path][1:] if stacked else shapes[row.path]
        for layer in range(config.layers) if stacked else (None,):
            result[getattr(row, naming).format(layer)] = np.ones(shape[::-1] if row.transpose else shape, np.float32)
    return result


def load(config, naming, **more):
    return to_params(tensors(config, naming, **more), config, naming=naming)


@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
def test_rotary_frequencies_of_the_layer(dtype):
    key = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    local, other = (rope_frequencies(CONFIG, local=local).astype(dtype) for local in (True, False))
    load(CONFIG, "hf", **{key.format(0): local, key.format(1): other})
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn.*frequencies that are not those of the config"
    ) as error:
        load(CONFIG, "hf", **{key.format(0): local, key.format(1): local})
    assert "layers.0" not in str(error.value)
    for wrong in (key.format(7), "model.rotary_emb.inv_freq"):
        with pytest.raises(ValueError, match="frequencies that are not"):
            load(CONFIG, "hf", **{wrong: local})


def test_divisors_of_rotary_frequencies():
    plain = dataclasses.replace(CONFIG, family="llama", sliding_window=None, local_rope_theta=None)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling("llama3", 8.0))
    divisors = rope_frequencies(plain) / rope_frequencies(scaled)
    load(scaled, "gguf", **{"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match=r"unexpected: rope_freqs\.weight"):
        load(plain, "gguf", **{"rope_freqs.weight": divisors})
