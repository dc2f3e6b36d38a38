"""SentencePiece tokenizers of GGUF files give the ids that the library of that name gives (golden/make.py)."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf_models import random_params, write_gguf

from es_jax.models.config import TransformerConfig
from es_jax.models.families import FAMILIES
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.model import load_model, save_model
from es_jax.weights.tokenizer import encode_prompt

GOLDEN = json.loads((Path(__file__).parent / "golden/sentencepiece.json").read_text(encoding="utf-8"))
MISTRAL = TransformerConfig(
    family="mistral", vocab_size=460, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=24,
    sliding_window=7, tied_embeddings=False,
)  # fmt: skip
GEMMA2 = dataclasses.replace(
    MISTRAL, family="gemma2", vocab_size=480, local_layers=(True, False), query_pre_attn_scalar=8, attn_softcap=50.0,
    final_softcap=30.0, tied_embeddings=True, **FAMILIES["gemma2"].flags,
)  # fmt: skip
CONFIGS = {"llama": (MISTRAL, (2,)), "gemma": (GEMMA2, (1, 5))}  # and where a turn ends


def metadata(name):
    """What a GGUF file of the model says; that there is a dummy space, and BOS, goes without saying."""
    golden = GOLDEN[name]
    fields = {"model": "llama", "tokens": golden["tokens"], "scores": golden["scores"], "token_type": golden["types"]}
    if name == "gemma":
        ids = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        fields |= {f"{theirs}_token_id": golden["ids"][ours] for theirs, ours in ids.items()}
        fields["add_space_prefix"] = False
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


CASES = [(name, text) for name in GOLDEN for text in GOLDEN[name]["texts"]]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: from_gguf_metadata(metadata(name)) for name in GOLDEN}


@pytest.mark.parametrize("name, text", CASES)
def test_ids_are_the_librarys_and_decoding_undoes_them(name, text, tokenizers):
    tokenizer, expected = tokenizers[name], GOLDEN[name]["texts"][text]
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.encode(text) == [GOLDEN[name]["ids"]["bos"], *expected]


def test_special_tokens_are_those_of_the_file(tokenizers):
    for name, tokenizer in tokenizers.items():
        ids = GOLDEN[name]["ids"]
        numbers = {key: getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "unk")}
        assert numbers == {key: ids[key] for key in numbers}
    assert tokenizers["gemma"].pad_token_id == 0 and tokenizers["llama"].pad_token_id is None


def test_the_dummy_space_stands_before_the_text_alone(tokenizers):
    def text_of(name, *parts):
        return tokenizers[name].convert_ids_to_tokens(tokenizers[name].encode("".join(parts), add_special_tokens=False))

    assert text_of("llama", "the", "<s>", "the", "</s>", " the") == ["▁the", "<s>", "t", "he", "</s>", "▁the"]
    assert text_of("gemma", "the", "<bos>", " the") == ["the", "<bos>", "▁the"]


def test_a_vocabulary_without_bytes_has_an_unknown_token():
    fields = metadata("llama")
    kinds = fields["tokenizer.ggml.token_type"]
    fields["tokenizer.ggml.token_type"] = [1 if kind == 6 else kind for kind in kinds]
    assert from_gguf_metadata(fields).encode("🙂", add_special_tokens=False)[-1] == 0


def test_the_highest_score_is_merged_first():
    """abc: ab + c by its scores, a + bc by the vocabulary's order."""
    fields = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "bc", "ab", "a", "b", "c"], "add_bos_token": False}
    fields |= {"token_type": [2, 3, 3, 1, 1, 1, 1, 1], "scores": [0, 0, 0, -2, -1, -3, -4, -5.0]}
    fields["add_space_prefix"] = False
    by_score = from_gguf_metadata({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    assert by_score.tokenize("abc") == ["ab", "c"] and by_score.encode("abc") == [4, 7]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores missing"),
        ({"tokens": None, "token_type": None}, r"ggml\.tokens, tokenizer\.ggml\.token_type missing"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not implemented"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap is not implemented"),
        ({"model": "t5"}, r"tokenizer\.ggml\.model = 't5' is not implemented"),
    ],
)
def test_what_is_missing_or_not_implemented_is_named(change, says):
    fields = metadata("llama") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=says):
        from_gguf_metadata({key: value for key, value in fields.items() if value is not None})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_file_out_to_a_folder_and_back(name, tmp_path):
    """The tokenizer that transformers reads from the folder gives the same ids as the file's."""
    config, ends = CONFIGS[name]
    params = random_params(config)
    write_gguf(tmp_path / "m.gguf", config, params, metadata(name))
    model = load_model(tmp_path / "m.gguf")
    assert model.config == config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), model.params, params)
    save_model(tmp_path / "out", model)
    back = load_model(tmp_path / "out")
    assert back.stop_token_ids == model.stop_token_ids == ends
    for text in GOLDEN[name]["texts"]:
        assert encode_prompt(back.tokenizer, text) == encode_prompt(model.tokenizer, text)
        assert back.tokenizer.decode(GOLDEN[name]["texts"][text]) == text
