"""The ids of stop tokens in a model's files: whole numbers are read, and all else is refused with the remedy."""

import json

import jax
import pytest
from test_model import CONFIG, tiny_metadata

from es_jax.models.transformer import Transformer
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.model import Model, load_outline, save_model
from es_jax.weights.tokenizer import check_token_ids, from_folder

WRONG = ["<|im_end|>", "7", "", [2, "<|im_end|>"], [[2]], -1, [0, -2], True, [False], 2.0, [2.5], {"id": 2}, [None]]


@pytest.fixture
def folder(tmp_path):
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0))
    save_model(tmp_path, Model(CONFIG, params, from_gguf_metadata(tiny_metadata()), "", (0, 2)))
    return tmp_path


def test_files_whose_eos_is_no_id_are_refused_by_name(folder):
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        for value in WRONG:
            (folder / name).write_text(json.dumps(fields | {"eos_token_id": value}))
            with pytest.raises(ValueError, match=rf"{name}: eos_token_id is .*: it must be a token id") as caught:
                load_outline(folder)
            assert f"eos_token_id is {value!r}: " in str(caught.value)
        (folder / name).write_text(json.dumps(fields | {"eos_token_id": [7, 9]}))
        assert {7, 9} <= set(load_outline(folder).stop_token_ids)
        (folder / name).write_text(json.dumps(fields | {"eos_token_id": None}))
        assert set(load_outline(folder).stop_token_ids) >= {0, 2}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("</s>", "a list of them; write the number that tokenizer.json has for '</s>'"),
        ([1, "<eos>"], "a list of them; write the number that tokenizer.json has for '<eos>'"),
        ("12", "a list of them; write 12 without quotation marks"),
        (-1, "a list of them"),
        (2.0, "a list of them"),
    ],
)
def test_the_remedy_is_the_number(value, hint):
    with pytest.raises(ValueError, match="it must be a token id") as caught:
        check_token_ids(value, "config.json: eos_token_id")
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize("value", [None, 0, 7, [], [7], [0, 2, 2]])
def test_ids_are_read_as_they_are(value):
    assert check_token_ids(value, "eos_token_id") == value


@pytest.mark.parametrize("value", ["2", "<|im_end|>", -1, True, 2.0, 259, 4294967295, [2]])
@pytest.mark.parametrize("name", ["bos", "eos", "unknown", "padding"])
def test_ids_of_gguf_metadata_are_of_its_tokens(name, value):
    says = rf"tokenizer\.ggml\.{name}_token_id is .*: it must be a token id, 0 to 258; load"
    with pytest.raises(ValueError, match=says):
        from_gguf_metadata({**tiny_metadata(), f"tokenizer.ggml.{name}_token_id": value})


@pytest.mark.parametrize("lines", ["Validation error\n  for 'bos_token_id':\n got '<s>'", "one\ttwo", ""])
def test_why_a_tokenizer_cannot_be_read_is_told_in_one_line(tmp_path, monkeypatch, lines):
    def fail(*arguments, **options):
        raise TypeError(lines)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match="no tokenizer could be read") as caught:
        from_folder(tmp_path)
    assert f"({' '.join(lines.split()) or 'TypeError'})" in str(caught.value)
