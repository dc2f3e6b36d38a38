"""Safetensors files that are cut, flipped or byte-swapped, and numbers that no weight has, end before training."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from es_jax.models.config import TransformerConfig
from es_jax.weights import files, safetensors
from es_jax.weights.convert import hf_tensors, to_params
from es_jax.weights.safetensors import SafetensorsReader

CONFIG = TransformerConfig(
    family="qwen2", vocab_size=32, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=24, qkv_bias=True
)


def tensors_of(config, dtype=np.float32):
    shapes, _ = hf_tensors({}, config=config)
    draw = np.random.default_rng(0)
    return {key: draw.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


@pytest.fixture
def file(tmp_path):
    save_file(tensors_of(CONFIG), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def header_of(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_the_librarys_file_is_read_and_the_library_reads_ours(file, tmp_path):
    from safetensors.numpy import load_file

    tensors = tensors_of(CONFIG)
    reader = SafetensorsReader([file])
    assert reader.shapes == {key: values.shape for key, values in tensors.items()}
    for key, values in tensors.items():
        np.testing.assert_array_equal(reader.read(key), values)
        np.testing.assert_array_equal(reader.read(key, 1, 3), values[1:3])
    shapes = {key: values.shape for key, values in tensors.items()}
    kind = np.dtype(np.float32)
    safetensors.write_folder(tmp_path, shapes, tensors.__getitem__, dtype=kind, max_shard_bytes=10**9)
    (ours,) = files.find_files(tmp_path)
    for key, values in load_file(ours).items():
        np.testing.assert_array_equal(values, tensors[key])


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_shards_hold_at_most_the_limit(limit, tmp_path):
    tensors = tensors_of(CONFIG)
    shapes = {key: values.shape for key, values in tensors.items()}
    kind = np.dtype(np.float32)
    safetensors.write_folder(tmp_path, shapes, tensors.__getitem__, dtype=kind, max_shard_bytes=limit)
    paths = tuple(sorted(tmp_path.glob("*.safetensors")))
    assert paths == files.find_files(tmp_path)
    assert len(paths) == {1: len(tensors), 10**9: 1}.get(limit, len(paths)) and (limit == 10**9 or len(paths) > 3)
    for path in paths:
        inside = SafetensorsReader([path]).shapes.values()
        assert len(inside) == 1 or sum(4 * np.prod(shape) for shape in inside) <= limit
    reader = SafetensorsReader(paths)
    for key, values in tensors.items():
        np.testing.assert_array_equal(reader.read(key), values)
    if len(paths) > 1:
        index = json.loads((tmp_path / files.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())


def test_every_cut_is_refused_before_anything_is_read(file):
    content, header = file.read_bytes(), header_of(file)
    for cut in [*range(0, header, 37), header - 1, header, header + 1, len(content) - 1]:
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="truncated or corrupt"):
            SafetensorsReader([file])
    file.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        SafetensorsReader([file])


def test_flipped_bits_of_the_header_never_change_a_number(file):
    """Every flip is refused, or leaves every parameter as it was."""
    content, header = bytearray(file.read_bytes()), header_of(file)
    whole = to_params(SafetensorsReader([file]), CONFIG, naming="hf")
    draw, refused = np.random.default_rng(1), 0
    flips = [(at, bit) for at in range(8) for bit in range(8)]
    flips += [(int(draw.integers(8, header)), int(draw.integers(8))) for _ in range(400)]
    for at, bit in flips:
        content[at] ^= 1 << bit
        file.write_bytes(content)
        content[at] ^= 1 << bit
        try:
            params = to_params(SafetensorsReader([file]), CONFIG, naming="hf")
        except ValueError:
            refused += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert refused > 0.9 * len(flips)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, "bfloat16 in float32"])
def test_bytes_in_the_wrong_order_are_refused(dtype, file):
    values = tensors_of(CONFIG, ml_dtypes.bfloat16 if isinstance(dtype, str) else dtype)
    if isinstance(dtype, str):  # the swapped bytes of such numbers are tiny instead of huge
        values = {key: tensor.astype(np.float32) for key, tensor in values.items()}
    raw = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    swapped = {k: t.view(raw[t.itemsize]).byteswap().view(t.dtype) for k, t in values.items()}
    save_file(swapped, file)
    with pytest.raises(ValueError, match=r"impossibly large or small numbers: model\.embed_tokens"):
        to_params(SafetensorsReader([file]), CONFIG, naming="hf")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5, -1e30])
@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_one_impossible_number_is_enough(bad, key, file):
    tensors = tensors_of(CONFIG)
    tensors[key][-1, -1] = bad
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"numbers: {key};"):
        to_params(SafetensorsReader([file]), CONFIG, naming="hf")


def test_a_tensor_of_zeros_and_one_of_float64_are_read(file):
    tensors = tensors_of(CONFIG, np.float64)
    tensors["model.layers.0.self_attn.v_proj.bias"][:] = 0
    save_file(tensors, file)
    params = to_params(SafetensorsReader([file]), CONFIG, naming="hf", dtype=jnp.bfloat16)
    expected = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)
    assert not params["layers"]["attn"]["v"]["bias"][0].any() and params["layers"]["attn"]["v"]["bias"][1].any()


def test_every_key_of_another_kind_or_twice_is_named(tmp_path):
    save_file({"a": np.ones(2, np.int64), "b": np.ones(2, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(2, np.float32), "c": np.ones(2, np.uint8)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match=r"a has dtype I64.*b is in another file.*c has dtype U8"):
        SafetensorsReader([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is damaged"), ('{"weight_map": {"a": "../x.safetensors"}}', "outside")]
)
def test_an_index_that_cannot_be_right(text, says, tmp_path):
    (tmp_path / files.INDEX).write_text(text)
    with pytest.raises(ValueError, match=says):
        files.find_files(tmp_path)


def test_a_folder_with_only_gguf_files_says_so(tmp_path):
    (tmp_path / "m.Q4_1.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"it has m\.Q4_1\.gguf: give the path"):
        files.find_files(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(file):
    reader = SafetensorsReader([file])
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="became shorter"):
        to_params(reader, CONFIG, naming="hf")
