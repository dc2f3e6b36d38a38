"""Leaves that are larger than any tensor are filled on their devices, and nothing larger than a tensor on the host."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core.mesh import make_mesh
from es_jax.core.tree import named_leaves
from es_jax.models.config import TransformerConfig
from es_jax.models.sharding import leaf_sharding
from es_jax.models.transformer import param_shapes
from es_jax.weights import convert
from es_jax.weights.convert import hf_tensors, to_params
from es_jax.weights.streaming import fetch

DEEP = TransformerConfig(
    family="llama",
    vocab_size=16,
    width=16,
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    tied_embeddings=False,
)


class Memory:
    """A reader of random tensors, made anew whenever they are read. `dtype`: as which they are read."""

    def __init__(self, config, dtype=np.float32):
        self.shapes, _ = hf_tensors({}, config=config)
        self.dtype, self.rows = dtype, []

    def read(self, key, start=0, stop=None):
        stop = self.shapes[key][0] if stop is None else stop
        self.rows.append((key, start, stop))
        size = int(np.prod(self.shapes[key][1:]))
        numbers = np.arange(start * size, stop * size, dtype=np.float32) % 8191 / 4096 + len(key)
        return numbers.reshape(stop - start, *self.shapes[key][1:]).astype(self.dtype)


def expected(config, path, reader):
    keys = [(key, slot) for key, slot in convert._slots(config, "hf").items() if slot.weight.path == path]
    tensors = [reader.read(key).T if slot.weight.transpose else reader.read(key) for key, slot in keys]
    return np.stack(tensors) if keys[0][1].layer is not None else tensors[0]


def over_all(path, shape):
    return leaf_sharding(make_mesh(), path, shape)


def by_layer(path, shape):
    spec = jax.sharding.PartitionSpec("groups" if path.startswith("layers/") else None)
    return jax.sharding.NamedSharding(make_mesh(4), spec)


def on_the_second(path, shape):
    return jax.sharding.SingleDeviceSharding(jax.devices()[1])


@pytest.mark.parametrize("shardings", [None, over_all, by_layer, on_the_second])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_leaf_holds_its_tensors_where_it_belongs(shardings, dtype):
    reader = Memory(DEEP)
    params = to_params(reader, DEEP, naming="hf", dtype=dtype, shardings=shardings)
    sizes = {path: int(np.prod(shape)) for path, shape in param_shapes(DEEP).items()}
    assert max(sizes.values()) > sizes["embed/embedding"]  # so both ways of placing are taken
    for path, leaf in named_leaves(params):
        np.testing.assert_array_equal(leaf, expected(DEEP, path, reader).astype(dtype), err_msg=path)
        if shardings is not None:
            assert leaf.sharding.is_equivalent_to(shardings(path, leaf.shape), leaf.ndim)
        else:
            assert not leaf.committed and len(leaf.devices()) == 1


def test_fetch_brings_leaf_and_layer_to_the_host():
    params = to_params(Memory(DEEP), DEEP, naming="hf", shardings=over_all)
    leaf = params["layers"]["mlp"]["gate"]["kernel"]
    assert not leaf.sharding.is_fully_replicated
    np.testing.assert_array_equal(fetch(leaf), np.asarray(leaf))
    np.testing.assert_array_equal(fetch(leaf, 2), np.asarray(leaf)[2])


def test_every_number_is_read_once():
    wide = dataclasses.replace(DEEP, vocab_size=40_000)  # more than one chunk
    reader = Memory(wide)
    to_params(reader, wide, naming="hf")
    for key, shape in reader.shapes.items():
        parts = [(start, stop) for name, start, stop in reader.rows if name == key]
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == shape[0]
    assert sum(key == "lm_head.weight" for key, *_ in reader.rows) > 2


@pytest.mark.parametrize("shape", [{"vocab_size": 100_000, "layers": 2}, {"layers": 3, "mlp_dim": 100_000}])
def test_the_host_holds_no_more_than_the_largest_tensor_and_a_fifth(shape):
    """NumPy's arrays, that is: device memory is not Python's to trace. benchmarks/load.py measures all of it."""
    config = dataclasses.replace(DEEP, width=64, **shape)
    reader = Memory(config, np.float16)
    largest = max(4 * int(np.prod(s)) for s in reader.shapes.values())
    param_shapes(config)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        params = to_params(reader, config, naming="hf")
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert largest < peak < 1.2 * largest
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > 1.9 * largest
