"""Which of a folder's weight files are read where there are several sets; what could not be read is not written."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_model import CONFIG, tiny_metadata

from es_jax.models.transformer import Transformer
from es_jax.weights import files
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.model import Model, load_model, load_outline, save_model
from tests.helpers import same


@pytest.fixture(scope="module")
def models():
    """Two of one shape: the older and the newer."""
    words = from_gguf_metadata(tiny_metadata())
    init = jax.jit(Transformer(CONFIG).init)
    return [Model(CONFIG, init(jax.random.key(i)), words, "", (0, 2)) for i in range(2)]


@pytest.fixture
def old(models, tmp_path):
    """The older one's folder: shards and their index; no sums, as on the hub."""
    save_model(tmp_path / "old", models[0], max_shard_bytes=20000)
    (tmp_path / "old" / files.SUMS).unlink()
    return tmp_path / "old"


@pytest.fixture
def new(models, tmp_path):
    """The newer one's, in a single file."""
    save_model(tmp_path / "new", models[1])
    (tmp_path / "new" / files.SUMS).unlink()
    return tmp_path / "new"


def index_of(folder):
    return json.loads((folder / files.INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("shards", ["whole", "one is gone", "all are gone", "the index is damaged"])
def test_a_single_file_is_read_and_not_the_shards_of_an_index_beside_it(shards, old, new, models, caplog):
    shutil.copy(new / files.SINGLE, old)
    there = sorted({*index_of(old).values()})
    for name in there[:1] if shards == "one is gone" else there * (shards == "all are gone"):
        (old / name).unlink()
    if shards == "the index is damaged":
        (old / files.INDEX).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert same(load_model(old).params, models[1].params)
    left = sorted(path.name for path in old.glob("model-*"))
    assert ("model.safetensors is read, as transformers does; not read: " + ", ".join(left) in caplog.text) == bool(
        left
    )
    assert load_outline(old).digest == load_outline(new).digest


def test_transformers_chooses_the_same_file(old, new):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    shutil.copy(new / files.SINGLE, old)
    theirs = AutoModelForCausalLM.from_pretrained(old).get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(theirs, load_model(old).params["embed"]["embedding"])


def test_an_index_of_the_single_file_is_no_other_set(new, models, caplog):
    keys = ["model.embed_tokens.weight", "model.norm.weight"]
    (new / files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, files.SINGLE)}))
    assert same(load_model(new).params, models[1].params) and not caplog.text


def test_shards_that_the_index_does_not_name_are_not_read_and_a_warning_says_so(old, models, caplog):
    names = sorted({*index_of(old).values()})
    shutil.copy(old / names[0], old / "model-00001-of-00009.safetensors")
    assert same(load_model(old).params, models[0].params)
    assert "not read: model-00001-of-00009.safetensors" in caplog.text


def test_an_index_that_lists_a_tensor_in_the_wrong_shard_is_refused(old):
    listed = index_of(old)
    *_, first, last = sorted({*listed.values()})
    wrong = next(key for key, name in listed.items() if name == first)
    (old / files.INDEX).write_text(json.dumps({"weight_map": listed | {wrong: last}}))
    with pytest.raises(ValueError, match=rf"{first}: {wrong} belongs in {last}, according to {files.INDEX}: fetch"):
        load_model(old)


def test_shards_of_another_cut_under_the_same_names_are_refused(old, models, tmp_path):
    """The first of two shards was written again, cut elsewhere."""
    shutil.rmtree(old)
    for name, limit in (("a", 60_000), ("b", 45_000)):
        save_model(tmp_path / name, models[0], max_shard_bytes=limit)
        (tmp_path / name / files.SUMS).unlink()
    first = sorted({*index_of(tmp_path / "a").values()})[0]
    assert sorted({*index_of(tmp_path / "b").values()})[0] == first
    shutil.copy(tmp_path / "a" / first, tmp_path / "b" / first)
    with pytest.raises(ValueError, match=r"(is in another file of the model too|belongs in model-)"):
        load_model(tmp_path / "b")


@pytest.mark.parametrize("kind", ["a single file", "shards", "no weights"])
def test_an_adapter_is_not_passed_over(kind, old, new):
    folder = old if kind == "shards" else new
    if kind == "no weights":
        (new / files.SINGLE).unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\).*merge it into its base"):
        load_model(folder)


def test_gguf_files_beside_safetensors_are_not_read_and_several_alone_are_listed(new, models):
    for name in ("m.Q4_0.gguf", "m.Q8_0.gguf"):
        (new / name).write_bytes(b"")
    assert same(load_model(new).params, models[1].params)
    (new / files.SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match=r"it has m\.Q4_0\.gguf, m\.Q8_0\.gguf: give the path of one"):
        load_model(new)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(np.nan, "float32"), (-np.inf, "float32"), (np.inf, "bfloat16"), (7e4, "float16"), (1e30, "float32"), (1e5, None)],
)
def test_what_could_not_be_read_is_not_written(number, dtype, models, tmp_path):
    leaves, tree = jax.tree.flatten(models[0].params)
    leaves[2] = leaves[2].at[(-1,) * leaves[2].ndim].set(number)
    broken = Model(CONFIG, jax.tree.unflatten(tree, leaves), models[0].tokenizer, "", (0, 2))
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.\S+ has NaN, infinite or impossibly large .* as (b?float)"
    ):
        save_model(tmp_path / "out", broken, dtype=dtype)
    assert not (tmp_path / "out").exists() and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("dtype", [jnp.float32, ml_dtypes.bfloat16, np.float16])
def test_the_largest_number_that_is_read_is_written(dtype, models, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(6e4), models[0].params)
    save_model(tmp_path / "out", Model(CONFIG, params, models[0].tokenizer, "", (0, 2)), dtype=dtype)
    assert float(load_model(tmp_path / "out").params["embed"]["embedding"].max()) > 5.9e4
