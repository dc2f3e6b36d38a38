"""config.json ↔ TransformerConfig, and the refusal of what is not implemented."""

import dataclasses
import re
from pathlib import Path

import pytest

from es_jax.models.config import RopeScaling
from es_jax.models.families import FAMILIES, WEIGHTS, find_family, weights_of
from es_jax.models.hf_config import from_hf, to_hf
from es_jax.models.transformer import param_shapes

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
FULL, LOCAL = "full_attention", "sliding_attention"


def fields(name, **more):
    return {**BASE, "model_type": name, "architectures": [FAMILIES[name].architecture], **more}


VARIANTS = [
    *((name, {}) for name in FAMILIES),
    ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 7, "layer_types": [LOCAL] * 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": [LOCAL, FULL] * 2}),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 3.0, "sliding_window": 9}),
    ("gemma3_text", {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gemma3_text", {"layer_types": [FULL] * 4, "query_pre_attn_scalar": 24}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    ("smollm3", {"no_rope_layer_interval": 3}),
]


@pytest.mark.parametrize("name, more", VARIANTS, ids=[f"{name}-{'-'.join(more)}" for name, more in VARIANTS])
def test_round_trip(name, more):
    config = from_hf(fields(name, **more))
    assert from_hf(to_hf(config)) == config
    assert {row.path for row in weights_of(config)} == set(param_shapes(config))


def test_what_a_missing_field_means():
    llama = from_hf({key: value for key, value in BASE.items() if key not in ("head_dim", "num_key_value_heads")})
    assert (llama.kv_heads, llama.head_dim, llama.rope_theta, llama.tied_embeddings) == (4, 4, 1e4, False)
    assert from_hf(fields("mistral")).sliding_window == 4096
    qwen3 = {key: value for key, value in fields("qwen3").items() if key != "head_dim"}
    assert from_hf(qwen3).head_dim == 128 and from_hf(qwen3).sliding_window is None
    gemma2, gemma3 = from_hf(fields("gemma2")), from_hf(fields("gemma3_text"))
    assert (gemma2.attn_softcap, gemma2.final_softcap, gemma2.query_pre_attn_scalar) == (50.0, 30.0, 256)
    assert gemma2.tied_embeddings and gemma2.local_layers == (True, False)
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.final_softcap) == (1e6, 1e4, None)
    assert from_hf(fields("smollm3")).rope_layers == (True, True, True, False)


def test_layer_kinds():
    late = from_hf(fields("qwen2", use_sliding_window=True, max_window_layers=3))
    assert [local for local, _ in late.layer_kinds] == [False, False, False, True]
    gemma3 = from_hf(fields("gemma3_text", num_hidden_layers=7))
    assert [local for local, _ in gemma3.layer_kinds] == [True] * 5 + [False, True]


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


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_both_places_of_rope_scaling(place):
    assert from_hf({**BASE, place: LLAMA3}).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "field",
    [
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {FULL: {"rope_type": "default"}}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModel": "modeling.Mine"}},
        {"partial_rotary_factor": 0.5},
        {"sliding_window": 128},
        {"layer_types": [FULL, LOCAL, FULL, FULL]},
        {"layer_types": [FULL]},
        {"layer_types": ["linear_attention"] * 4},
        {"num_local_experts": 8},
        {"attention_sinks": True},
        {"novelty": None},
        {"vocab_size": None},
        {"hidden_size": "16"},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"rope_theta": "big"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        from_hf({**BASE, **field})


@pytest.mark.parametrize(
    "name, field",
    [
        ("mistral", {"layer_types": [FULL] * 4}),
        ("qwen3", {"layer_types": [LOCAL] * 4}),
        ("gemma2", {"sliding_window": None}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma2", {"hidden_activation": "relu"}),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("gemma3_text", {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}}),
        ("smollm3", {"use_sliding_window": True}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("llama", {"no_rope_layers": [1, 1, 1, 0]}),
    ],
)
def test_a_family_refuses_what_it_does_not_compute(name, field):
    with pytest.raises(ValueError, match="layer_types" if "sliding_window" in field else next(iter(field))):
        from_hf(fields(name, **field))


def test_problems_are_collected():
    with pytest.raises(ValueError, match=r"mlp_bias.*novelty.*hidden_size is missing.*yarn"):
        from_hf({**BASE, "mlp_bias": True, "hidden_size": None, "novelty": 3, "rope_scaling": {"type": "yarn"}})


def test_what_changes_nothing_is_accepted():
    assert from_hf({**BASE, "use_cache": True, "eos_token_id": 7, "torch_dtype": "bfloat16"}) == from_hf(BASE)


# Fields that published models have beside the sizes: Llama 3.2, SmolLM2, Mistral, Qwen2.5, Qwen3, Gemma, SmolLM3.
PUBLISHED = [
    ("llama", {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02}),
    ("llama", {"mlp_bias": False, "pretraining_tp": 1, "rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
    ("mistral", {"sliding_window": None, "hidden_act": "silu", "rope_theta": 1000000.0}),
    ("qwen2", {"use_mrope": False, "max_window_layers": 70, "sliding_window": 32768, "use_sliding_window": False}),
    ("qwen3", {"attention_bias": False, "max_window_layers": 28, "rope_scaling": None, "sliding_window": None}),
    (
        "gemma2",
        {"hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "query_pre_attn_scalar": 144},
    ),
    ("gemma3_text", {"rope_local_base_freq": 10000, "sliding_window_pattern": 6, "attn_logit_softcapping": None}),
    ("smollm3", {"no_rope_layer_interval": 4, "max_window_layers": 28, "layer_types": [FULL] * 4, "pretraining_tp": 2}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "sliding_window": None}),
]


@pytest.mark.parametrize("name, more", PUBLISHED)
def test_fields_of_published_models_are_accepted(name, more):
    config = from_hf(fields(name, **more))
    assert config.sliding_window is None or name.startswith("gemma")


def test_a_config_that_its_family_cannot_express_is_not_written():
    config = dataclasses.replace(from_hf(BASE), sliding_window=5, qk_norm=True)
    with pytest.raises(ValueError, match=r"llama.*sliding_window.*qk_norm"):
        to_hf(config)


def test_unknown_names_suggest():
    with pytest.raises(ValueError, match="did you mean 'qwen2' or 'qwen3'"):
        find_family("qwen2_moe")
    with pytest.raises(ValueError, match="architecture 'LlamaForSequenceClassification': did you mean"):
        from_hf({**BASE, "architectures": ["LlamaForSequenceClassification"]})


@pytest.mark.parametrize("name", FAMILIES)
def test_file_keys_are_distinct(name):
    rows = {row.path: row for row in (*WEIGHTS, *FAMILIES[name].names)}.values()
    used = [row for row in weights_of(from_hf(fields(name, tie_word_embeddings=False)))]
    for naming in ("hf", "gguf"):
        assert len({getattr(row, naming) for row in used}) == len(used) <= len(rows)


def test_the_docs_list_every_family_and_its_parity():
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    for family in FAMILIES.values():
        assert f"| `{family.name}` | {family.architecture} | `{family.gguf_architecture}`" in text
        assert len(re.findall(rf"^\| {family.name} \| .* \| (?:yes|no) \|", text, flags=re.M)) >= 4
