"""Fields of model files that no model has are refused with the model's name, before numbers are read."""

import json
import shutil

import pytest

from es_jax.models.config import MOST_LAYERS
from es_jax.tasks.rows import read_rows
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.model import load_model, save_model


@pytest.fixture
def folder(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "field", "value", "says"),
    [
        ("config.json", "num_hidden_layers", 2**40, rf"layers = {2**40} must be at most {MOST_LAYERS}"),
        ("config.json", "num_hidden_layers", MOST_LAYERS + 1, "must be at most"),
        ("config.json", "head_dim", 17, "head_dim = 17 must be even"),
        ("config.json", "architectures", [[]], "unhashable|architecture"),
        ("tokenizer_config.json", "model_max_length", "many", "model_max_length is 'many': it must be a number"),
        ("tokenizer_config.json", "model_max_length", {}, r"model_max_length is \{\}: it must be a number"),
    ],
)
def test_a_field_that_no_model_has(name, field, value, says, folder):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {field: value}))
    with pytest.raises(ValueError, match=rf"{folder}.*({says})"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_too_deep(name, folder):
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{folder}.*{name} is not JSON"):
        load_model(folder)


def test_a_safetensors_header_that_is_longer_than_its_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes((2**50).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=rf"truncated or corrupt \(its header needs {2**50} bytes, the file has "):
        load_model(folder)


@pytest.mark.parametrize("merge", ["h k", "q h", "x"])
def test_a_gguf_tokenizer_that_the_library_refuses(merge):
    fields = {"model": "gpt2", "pre": "smollm", "tokens": ["h", "i", "hi"], "token_type": [1, 1, 1], "merges": [merge]}
    with pytest.raises(ValueError, match=r"its tokenizer is damaged \(.+\); fetch it again, or load the model's"):
        from_gguf_metadata({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"\xbc\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"question": text}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet is damaged or not parquet"):
        read_rows(tmp_path / "train.parquet")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left (os error 28)")])
def test_a_disk_that_is_full_while_a_model_is_saved(error, tiny_model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("es_jax.weights.safetensors.write_folder", fail)
    with pytest.raises(OSError, match=rf"{tmp_path}/out could not be written \(No space left.*\): free some space"):
        save_model(tmp_path / "out", load_model(tiny_model))
    assert not [*tmp_path.iterdir()]
