"""config.json ↔ TransformerConfig, and the refusal of what is not implemented."""

import pytest

from es_jax.models.families import FAMILIES, find_family, from_hf, to_hf

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name):
    config = from_hf({**BASE, "model_type": name, "architectures": [FAMILIES[name].architecture]})
    assert (config.kv_heads, config.head_dim, config.rope_theta, config.tied_embeddings) == (
        4,
        4,
        10000.0,
        False,
    )
    assert config.qkv_bias == FAMILIES[name].qkv_bias
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    "field",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {
            "rope_theta": 5e5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": None,
        },
    ],
)
def test_both_places_of_rope_theta(field):
    assert from_hf({**BASE, **field}).rope_theta == 5e5


@pytest.mark.parametrize(
    "field",
    [
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModel": "modeling.Mine"}},
        {"sliding_window": 128},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"vocab_size": None},
    ],
    ids=lambda field: next(iter(field)),
)
def test_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        from_hf({**BASE, **field})


def test_problems_are_collected():
    with pytest.raises(ValueError, match=r"mlp_bias.*hidden_size is missing"):
        from_hf({**BASE, "mlp_bias": True, "hidden_size": None})


def test_unread_fields_are_logged(caplog):
    from_hf({**BASE, "novelty": 3, "use_cache": True})
    assert "novelty" in caplog.text and "use_cache" not in caplog.text


def test_unknown_names_suggest():
    with pytest.raises(ValueError, match="did you mean 'qwen2'"):
        find_family("qwen3")
    with pytest.raises(ValueError, match="architecture 'LlamaForSequenceClassification': did you mean"):
        from_hf({**BASE, "architectures": ["LlamaForSequenceClassification"]})
