"""What is exported is read alike by transformers 5 and 4: text, token ids, chat template, config.

The environment variable ES_JAX_TRANSFORMERS4 may name a Python that has transformers 4; else the fields that it reads
are checked.
"""

import dataclasses
import json
import os
import subprocess

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from test_chat_templates import CHATML, FOLDED, byte_level, sentencepiece_like
from test_model import CONFIG

from es_jax.models.config import RopeScaling, TransformerConfig
from es_jax.models.families import FAMILIES
from es_jax.models.transformer import param_shapes
from es_jax.weights.model import Model, load_model, save_model
from es_jax.weights.tokenizer import from_folder

TEXTS = ["the other  hen", " the\n\tend . , don 't", "naïve 你好 🙂 12", "[INST]the<|im_start|>hi<|im_end|>"]
GEMMA = {"post_norms": True, "norm_plus_one": True, "activation": "gelu_tanh", "scale_embeddings": True}
CONFIGS = {
    "llama": CONFIG,
    "llama3": dataclasses.replace(CONFIG, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0)),
    "mistral": dataclasses.replace(CONFIG, family="mistral", sliding_window=16, rope_theta=1e6),
    "qwen2": dataclasses.replace(CONFIG, family="qwen2", qkv_bias=True, rope_scaling=RopeScaling("linear", 2.0)),
    "qwen3": dataclasses.replace(CONFIG, family="qwen3", qk_norm=True),
    "gemma3_text": TransformerConfig(
        family="gemma3_text", vocab_size=300, width=24, layers=3, heads=4, kv_heads=2, head_dim=10, mlp_dim=40,
        rope_theta=1e6, local_rope_theta=1e4, sliding_window=16, local_layers=(True, True, False), qk_norm=True,
        query_pre_attn_scalar=10, **GEMMA,
    ),
    "smollm3": dataclasses.replace(
        CONFIG, family="smollm3", layers=4, rope_layers=(True, True, True, False), rope_theta=2e6
    ),
}  # fmt: skip
READ = """
import json, sys
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
out = {}
for folder in sys.argv[2:]:
    t, c = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    out[folder] = {
        "ids": [t.encode(x) for x in json.loads(sys.argv[1])],
        "back": [t.decode(t.encode(x)) for x in json.loads(sys.argv[1])],
        "without": [t.decode(t.encode(x), skip_special_tokens=True) for x in json.loads(sys.argv[1])],
        "chat": t.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False),
        "special": sorted(t.all_special_ids), "names": sorted(t("the")), "side": t.padding_side,
        "theta": c.to_dict().get("rope_theta"), "type": c.model_type, "dtype": str(c.dtype).split(".")[-1],
        "stops": GenerationConfig.from_pretrained(folder).eos_token_id,
    }
print(json.dumps(out))
"""


def as_on_the_hub(folder):
    """As transformers 4 wrote it: an added-tokens table, special tokens with and without names, a class of its own."""
    byte_level().save_pretrained(str(folder))
    fields = {
        "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None, "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "padding_side": "left", "model_max_length": 512, "errors": "replace",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "extra_special_tokens": {"audio_token": "a"},
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {"0": {
            "content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return from_folder(folder)


def tokenizer_of(kind, folder):
    kinds = {"byte-level": lambda _: byte_level(), "sentencepiece": sentencepiece_like, "hub": as_on_the_hub}
    tokenizer = kinds[kind](folder)
    tokenizer.chat_template = FOLDED if kind == "sentencepiece" else CHATML
    return tokenizer


def saved(folder, tokenizer, config=CONFIG, stops=(0, 2), **generation):
    params = unflatten_dict(
        {path: np.zeros(shape, np.float32) for path, shape in param_shapes(config).items()}, sep="/"
    )
    save_model(folder, Model(config, params, tokenizer, "", stops, generation))
    return [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]


def seen(tokenizer):
    """What must not change."""
    return {
        "ids": [tokenizer.encode(text) for text in TEXTS],
        "back": [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS],
        "without": [tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in TEXTS],
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False),
        "special": sorted(tokenizer.all_special_ids),
        "names": sorted(tokenizer("the")),
        "side": tokenizer.padding_side,
    }


@pytest.mark.parametrize("kind", ["byte-level", "hub", "sentencepiece"])
def test_the_tokenizer_is_the_same_and_its_fields_are_of_both_versions(kind, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = tokenizer_of(kind, tmp_path / "first")
    saved(tmp_path / "out", tokenizer)
    fields = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"  # both have it; "TokenizersBackend" is of 5 alone
    assert isinstance(fields.get("extra_special_tokens", {}), dict)  # a list in 5, a dict in 4, which both read
    assert fields.get("additional_special_tokens", []) == list(tokenizer.extra_special_tokens)
    assert fields["padding_side"] == tokenizer.padding_side and fields["model_input_names"]
    assert not {"is_local", "backend", "model_specific_special_tokens"} & fields.keys()
    for folder in (tmp_path / "out", tmp_path / "again"):
        again = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else str(tmp_path / "out"))
        assert seen(again) == seen(tokenizer)
        if kind == "hub":
            assert again.audio_token == "a" and again.padding_side == "left"
        if not folder.exists():
            saved(folder, again)  # what was exported is exported alike
            assert json.loads((folder / "tokenizer_config.json").read_text()) == fields
    assert AutoConfig.from_pretrained(str(tmp_path / "out")).model_type == "llama"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_config_has_the_fields_of_both_versions(name, tmp_path):
    from transformers import AutoConfig

    config = CONFIGS[name]
    fields, _ = saved(tmp_path / "out", byte_level(), config)
    assert fields["torch_dtype"] == fields["dtype"] == "float32"  # 4 and 5
    assert fields["rope_theta"] == config.rope_theta
    assert (fields.get("rope_scaling") is None) == (config.rope_scaling is None)
    if config.local_rope_theta is not None:
        assert fields["rope_local_base_freq"] == config.local_rope_theta
        assert fields["rope_parameters"]["full_attention"]["rope_theta"] == config.rope_theta
    elif config.rope_scaling is not None:
        assert fields["rope_scaling"].items() <= fields["rope_parameters"].items()
    read = AutoConfig.from_pretrained(str(tmp_path / "out"))
    assert str(read.dtype).endswith("float32") and read.num_hidden_layers == config.layers
    assert load_model(tmp_path / "out").config == config


def test_every_family_is_tried():
    assert FAMILIES.keys() - {"gemma2"} <= CONFIGS.keys()


@pytest.mark.parametrize(
    ("pad", "stops", "rows", "expected"),
    [
        ("<pad>", (0, 2), 259, {"pad_token_id": None, "eos_token_id": [0, 2]}),  # a loader added it
        ("<pad>", (0, 2), 300, {"pad_token_id": 259, "eos_token_id": [0, 2]}),  # the model has rows to spare
        ("<|endoftext|>", (0, 2, 259), 259, {"pad_token_id": 0, "eos_token_id": [0, 2]}),
        ("<|endoftext|>", (400,), 259, {"pad_token_id": 0, "eos_token_id": None}),
    ],
)
def test_no_token_id_is_named_that_the_model_has_no_row_for(pad, stops, rows, expected, tmp_path):
    from transformers import AutoConfig, GenerationConfig

    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": pad})
    config, more = dataclasses.replace(CONFIG, vocab_size=rows), {"forced_bos_token_id": 1000, "top_k": 1000}
    fields, generation = saved(tmp_path / "out", tokenizer, config, stops, **more)
    assert fields["pad_token_id"] == generation["pad_token_id"] == expected["pad_token_id"]
    assert fields["eos_token_id"] == 2 and generation["eos_token_id"] == expected["eos_token_id"]
    assert generation["forced_bos_token_id"] is None and generation["top_k"] == 1000
    assert AutoConfig.from_pretrained(str(tmp_path / "out")).pad_token_id == expected["pad_token_id"]
    assert GenerationConfig.from_pretrained(str(tmp_path / "out")).eos_token_id == expected["eos_token_id"]
    assert load_model(tmp_path / "out").tokenizer.pad_token == pad


def test_transformers_4_reads_it(tmp_path):
    python = os.environ.get("ES_JAX_TRANSFORMERS4")
    if not python:
        pytest.skip("set ES_JAX_TRANSFORMERS4 to a Python that has transformers 4")
    expected = {}
    for kind in ("byte-level", "hub", "sentencepiece"):
        tokenizer = tokenizer_of(kind, tmp_path / "first" / kind)
        saved(tmp_path / kind, tokenizer)
        expected[str(tmp_path / kind)] = seen(tokenizer) | {"theta": 1e4, "type": "llama"}
    for name, config in CONFIGS.items():
        tokenizer = tokenizer_of("byte-level", tmp_path)
        saved(tmp_path / name, tokenizer, config)
        expected[str(tmp_path / name)] = seen(tokenizer) | {"theta": config.rope_theta, "type": config.family}
    command = [python, "-c", READ, json.dumps(TEXTS), *expected]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    common = {"dtype": "float32", "stops": [0, 2]}
    assert json.loads(done.stdout) == {folder: fields | common for folder, fields in expected.items()}
