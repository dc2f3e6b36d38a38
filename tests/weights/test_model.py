"""Files ↔ parameters: logits equal transformers', nothing lost, broken input refused with all problems."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer
from es_jax.weights import files, safetensors
from es_jax.weights.convert import half_split
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.model import Model, config_only, load_model, load_outline, save_model
from tests.helpers import same

CONFIG = TransformerConfig(
    family="llama", vocab_size=300, width=24, layers=2, heads=4, kv_heads=2, head_dim=10, mlp_dim=40
)


def tiny_metadata():
    from tokenizers import pre_tokenizers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 256,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def model():
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0))
    return Model(CONFIG, params, from_gguf_metadata(tiny_metadata()), "", (0, 2))


@pytest.fixture
def folder(tmp_path, model):
    save_model(tmp_path / "saved", model)
    return tmp_path / "saved"


def _torch_model(family, **options):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
    sizes |= dict(num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)
    sizes |= dict(rope_parameters={"rope_type": "default", "rope_theta": 321.0}, initializer_range=0.2)
    kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
    reference = transformers.AutoModelForCausalLM.from_config(kind(**sizes, **options)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return reference


def _torch_logits(reference, tokens):
    import torch

    with torch.no_grad():
        return reference(torch.tensor(tokens)).logits.float().numpy()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family, options", [("llama", {"head_dim": 12}), ("llama", {}), ("qwen2", {})])
def test_logits_equal_transformers(tmp_path, model, family, options, tied):
    reference = _torch_model(family, tie_word_embeddings=tied, **options)
    reference.save_pretrained(tmp_path / "theirs")
    model.tokenizer.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.tied_embeddings == tied and ours.config.rope_theta == 321.0
    tokens = np.random.default_rng(0).integers(0, 300, (2, 17))
    expected = _torch_logits(reference, tokens)
    logits = jax.jit(Transformer(ours.config).apply)(ours.params, jnp.asarray(tokens, jnp.int32))[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # and back: what we save, transformers reads
    save_model(tmp_path / "ours", ours)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").eval()
    np.testing.assert_allclose(_torch_logits(again, tokens), expected, atol=1e-5)
    assert again.generation_config.eos_token_id == [0, 2]


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, family="qwen2", qkv_bias=True)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_load_undoes_save(tmp_path, model, config, dtype):
    params = jax.jit(lambda key: Transformer(config).init(key, dtype=dtype))(jax.random.key(1))
    save_model(tmp_path, dataclasses.replace(model, config=config, params=params))
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.config == config == config_only(tmp_path)
    assert loaded.stop_token_ids == (0, 2) and len(loaded.digest) == 64
    assert same(loaded.params, params)
    text = "Was kostet 12345 € \n\n ok?"
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)


def test_placement(folder, model):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = load_model(folder, mesh=mesh)
    assert len(replicated.params["final_norm"]["scale"].sharding.device_set) == 8
    spec = jax.sharding.PartitionSpec

    def rule(path, shape):
        return jax.sharding.NamedSharding(mesh, spec(None, "d") if path.endswith("mlp/gate/kernel") else spec())

    sharded = load_model(folder, shardings=rule).params
    assert sharded["layers"]["mlp"]["gate"]["kernel"].addressable_shards[0].data.shape == (2, 3, 40)
    assert same(sharded, model.params)


def test_all_key_problems_in_one_error(folder):
    file = folder / "model.safetensors"
    reader = safetensors.SafetensorsReader([file])
    tensors = {k: np.array(reader.read(k)) for k in reader.shapes}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["stranger"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(5, np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for line in (
        "missing: model.layers.1.mlp.up_proj",
        "unexpected: stranger",
        "wrong shape: model.norm.weight",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_must_equal_the_embedding(folder, model, equal):
    file = folder / "model.safetensors"
    reader = safetensors.SafetensorsReader([file])
    tensors = {k: np.array(reader.read(k)) for k in reader.shapes}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(not equal)
    (folder / "SHA256SUMS").unlink()
    save_file(tensors, file)
    if equal:
        assert same(load_model(folder).params, model.params)
    else:
        with pytest.raises(ValueError, match=r"unexpected: lm_head\.weight"):
            load_model(folder)


def test_shards(folder, model):
    reader = safetensors.SafetensorsReader([folder / "model.safetensors"])
    tensors = {k: np.array(reader.read(k)) for k in reader.shapes}
    names = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(tensors)}
    for name in set(names.values()):
        part = {k: v for k, v in tensors.items() if names[k] == name}
        save_file(part, folder / name)
    del reader
    (folder / "model.safetensors").unlink()
    (folder / files.INDEX).write_text(json.dumps({"weight_map": names}))
    assert same(load_model(folder).params, model.params)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: model-1\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_model(folder)


def test_nothing_to_read(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only as \.bin files.*save_pretrained"):
        load_model(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"is not a folder, a \.gguf file or a hub name"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="not in the hub's cache"):
        load_model("nobody/nothing-of-this-name")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing of use")
    with pytest.raises(ValueError, match="truncated or corrupt GGUF"):
        load_model(tmp_path / "broken.gguf")


def test_half_split_undoes_the_interleaving():
    rows = np.arange(48).reshape(12, 4)
    interleaved = rows.reshape(2, 2, 3, 4).swapaxes(1, 2).reshape(12, 4)
    np.testing.assert_array_equal(half_split(interleaved, heads=2), rows)


def test_generation_settings_are_carried_over_and_a_folder_in_use_is_refused(folder, tmp_path, model):
    file = folder / "generation_config.json"
    fields = json.loads(file.read_text()) | {"temperature": 0.7, "repetition_penalty": 1.05}
    file.write_text(json.dumps(fields))
    save_model(tmp_path / "again", load_model(folder))
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == fields
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_model(tmp_path / "again", model)
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_model(tmp_path / "third", model, max_shard_bytes=0)


def test_what_a_killed_export_left_is_deleted_by_the_next(tmp_path, model):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = {pid: f".out.{platform.node()}.{pid}" for pid in (ended.pid, os.getppid(), "notes")}
    for name in names.values():
        (tmp_path / name / "inside").mkdir(parents=True)
    save_model(tmp_path / "out", model)
    assert sorted(os.listdir(tmp_path)) == sorted([names[os.getppid()], names["notes"], "out"])


DAMAGE = [
    ("config.json", "[1]", r"config\.json holds list instead of fields"),
    ("config.json", "null", r"config\.json holds NoneType instead of fields"),
    ("config.json", "{", r"config\.json is not JSON"),
    ("generation_config.json", "[]", r"generation_config\.json holds list"),
    ("tokenizer.json", "{", r"no tokenizer could be read \(.*\); add its tokenizer\.json"),
    ("tokenizer.json", "{}", r"no tokenizer could be read"),
    ("SHA256SUMS", "nonsense\n", r"SHA256SUMS is damaged"),
    ("model.safetensors", "", r"model\.safetensors is truncated or corrupt"),
]


@pytest.mark.parametrize("name, content, says", DAMAGE)
def test_damaged_files_are_named_in_a_sentence(name, content, says, folder):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=says) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_folder_in_the_place_of_a_file_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors cannot be read .*check that it is a file"):
        load_model(folder)


def test_the_outline_is_the_model_without_its_weights(folder):
    outline, whole = load_outline(folder), load_model(folder)
    assert outline.params == {} and outline.digest == whole.digest and outline.stop_token_ids == whole.stop_token_ids
    assert outline.config == whole.config
