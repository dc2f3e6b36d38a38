"""Copies tensors of files to leaves on devices and back, with one tensor at a time on the host."""

import functools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Shape = tuple[int, ...]
Shardings = Callable[[str, Shape], Sharding]  # (path, shape) → where the leaf lives

_CHUNK = 1 << 18  # numbers read and converted at once
_LOOKS = 100  # checks whether a buffer is gone, 0.1 ms apart


@runtime_checkable
class Reader(Protocol):
    """The tensors of a file format, by key."""

    shapes: dict[str, Shape]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows `start` to `stop` of a tensor, in any float type."""


class StoredTensor(NamedTuple):
    """A tensor in a file: contiguous numbers, in blocks if they are quantised."""

    file: Path
    shape: Shape  # slowest first
    start: int  # first byte in the file
    kind: Any  # the dtype of plain floats, or a gguf.GGMLQuantizationType
    block: tuple[int, int]  # numbers in a block, and its bytes


class FileReader:
    """The `Reader` of files."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self._tensors = tensors
        self.shapes = {key: tensor.shape for key, tensor in tensors.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows `start` to `stop` of a tensor: plain floats in their own type, others dequantised to float32."""
        file, shape, base, kind, (numbers, size) = self._tensors[key]
        stop = shape[0] if stop is None else stop
        first, end = (row * math.prod(shape[1:]) // numbers * size for row in (start, stop))
        content = np.fromfile(file, np.uint8, count=end - first, offset=base + first)
        if content.size != end - first:
            raise ValueError(f"{file} became shorter while it was read: fetch it again")
        if isinstance(kind, np.dtype):
            values = content.view(kind)
        else:
            from gguf.quants import dequantize

            values = dequantize(content.reshape(-1, shape[-1] // numbers * size), kind)
        return values.reshape(stop - start, *shape[1:])


def row_slices(shape: Shape, numbers: int = _CHUNK) -> Iterator[slice]:
    """Slices over the rows of a shape in order: about `numbers` numbers at a time, but at least one row.

    >>> list(row_slices((5, 3), 6))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows = max(numbers // max(math.prod(shape[1:]), 1), 1)
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def chunks(reader: Reader, key: str) -> Iterator[tuple[slice, np.ndarray]]:
    """The tensor's rows in order, in chunks: (slice of rows, their numbers)."""
    return ((rows, reader.read(key, rows.start, rows.stop)) for rows in row_slices(reader.shapes[key]))


def widened(chunk: np.ndarray) -> np.ndarray:
    """The same numbers as float32 (float64 stays float64); for bfloat16 it is ten times as fast as NumPy's cast.

    >>> widened(np.array([1.5, -0.0], ml_dtypes.bfloat16)).tolist()
    [1.5, -0.0]
    """
    if chunk.dtype != ml_dtypes.bfloat16:
        return chunk.astype(np.promote_types(chunk.dtype, np.float32), copy=False)
    bits = chunk.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def is_plausible(largest: Any) -> bool:
    """Whether it can be the largest magnitude in a tensor of weights: 0, or within the normal range of float16. NaN, a
    wrong byte order or a flipped bit of an exponent fail this."""
    return bool(largest == 0 or np.finfo(np.float32).tiny <= largest <= 65504)


def staging(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An empty host array for `place` that a CPU device cannot adopt: a leaf in adopted memory cannot be donated."""
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = (16 - raw.ctypes.data) % 64
    return raw[start : start + count].view(dtype).reshape(shape)


def place(make: Callable[[], np.ndarray], sharding: Sharding | None) -> jax.Array:
    """The host array that `make` returns, on its devices, each with its own part; nothing else may keep the array."""
    buffer = make()
    if sharding is None:
        leaf = jax.device_put(buffer)
    else:
        leaf = jax.make_array_from_callback(buffer.shape, sharding, buffer.__getitem__)
    leaf.block_until_ready()
    memory, looks = weakref.ref(buffer if buffer.base is None else buffer.base), _LOOKS * (buffer.size > _CHUNK)
    del buffer
    while looks and memory() is not None:
        looks -= 1
        jax.device_put(0.0)  # JAX releases a buffer only at a call some time after the copy
        time.sleep(1e-4)
    return leaf


def place_stacked(
    layers: Sequence[Callable[[], np.ndarray]], shape: Shape, *, dtype: np.dtype, sharding: Sharding | None
) -> jax.Array:
    """A leaf [L, …], filled on its devices layer by layer; the host holds one layer."""
    stack = jnp.zeros(shape, dtype, device=sharding)
    for i, make in enumerate(layers):
        stack = _setter(sharding)(stack, place(make, _of_layer(sharding)), np.int32(i))
        jax.block_until_ready(stack)  # so that the next layer reuses this one's memory
    return stack


def fetch(leaf: Any, layer: int | None = None) -> np.ndarray:
    """The whole leaf, or one layer of a leaf [L, …], on the host of every process."""
    if isinstance(leaf, np.ndarray):
        return leaf if layer is None else leaf[layer]
    here = leaf.is_fully_addressable
    if here and layer is None:
        return np.asarray(leaf)
    sharding = _of_layer(leaf.sharding) if here else NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return np.asarray(_getter(sharding, layer is None)(leaf, np.int32(layer or 0)))


def _of_layer(sharding: Sharding | None) -> Sharding | None:
    """The sharding of one layer of a leaf that is stacked over layers."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


@functools.cache
def _setter(sharding: Sharding | None) -> Callable[..., jax.Array]:
    fill = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _getter(sharding: Sharding | None, whole: bool) -> Callable[..., jax.Array]:
    cut = functools.partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
    return jax.jit((lambda leaf, _: leaf) if whole else cut, out_shardings=sharding)
