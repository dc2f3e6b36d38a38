"""Tensors of files to leaves on devices and back, one tensor at a time on the host."""

import functools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Shardings = Callable[[str, tuple[int, ...]], Sharding]  # (path, shape) → where the leaf lives

_CHUNK = 1 << 18  # numbers that are read and converted at once
_PATIENCE = 100  # looks, 0.1 ms apart
_LARGEST = 65504.0  # what float16 holds: no weight is larger


@runtime_checkable
class Reader(Protocol):
    """Tensors by key, as a file format offers them."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows `start` to `stop` of the tensor with that key, in any float type."""


def chunks(reader: Reader, key: str) -> Iterator[tuple[slice, np.ndarray]]:
    """The tensor's rows in order, a chunk at a time: (which rows, their numbers)."""
    shape = reader.shapes[key]
    rows = max(_CHUNK // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield slice(start, stop), reader.read(key, start, stop)


def widened(chunk: np.ndarray) -> np.ndarray:
    """The same numbers as float32, or float64 where they are; bfloat16 ten times as fast as NumPy's cast.

    >>> import ml_dtypes
    >>> widened(np.array([1.5, -0.0], ml_dtypes.bfloat16)).tolist()
    [1.5, -0.0]
    """
    if chunk.dtype != ml_dtypes.bfloat16:
        return chunk.astype(np.promote_types(chunk.dtype, np.float32), copy=False)
    bits = chunk.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


class Range:
    """The largest magnitude of a tensor that is seen chunk by chunk."""

    def __init__(self) -> None:
        self._low, self._high, self._zero = 0.0, 0.0, True

    def add(self, values: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):  # NaN: seen in the end
            self._low, self._high = np.minimum(self._low, values.min()), np.maximum(self._high, values.max())
            self._zero = self._zero and not values.any()

    def plausible(self) -> bool:
        """Whether it can be a weight: finite, within float16's range, and not subnormal throughout.

        Bytes in the wrong order, or a flipped bit of an exponent, break this.

        >>> seen = Range()
        >>> seen.add(np.array([1.0, -2.0], np.float32).byteswap())
        >>> seen.plausible()
        False
        """
        largest = float(np.maximum(-self._low, self._high))
        return self._zero or float(np.finfo(np.float32).tiny) <= largest <= _LARGEST


def staging(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty host array for `place`, at an address that a CPU device cannot adopt as its own.

    What it adopts is not its to give away: the first update of the leaf could not donate it, and would hold it twice.
    """
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = (16 - raw.ctypes.data) % 64
    return raw[start : start + count].view(dtype).reshape(shape)


def place(make: Callable[[], np.ndarray], sharding: Sharding | None) -> jax.Array:
    """A host array that `make` returns, and nobody else keeps or changes, on its devices, each given its own part."""
    buffer = make()
    if sharding is None:
        leaf = jax.device_put(buffer)
    else:
        leaf = jax.make_array_from_callback(buffer.shape, sharding, buffer.__getitem__)
    jax.block_until_ready(leaf)
    held, large = weakref.ref(buffer if buffer.base is None else buffer.base), buffer.size > _CHUNK
    del buffer
    for _ in range(_PATIENCE if large else 0):
        if held() is None:
            break
        jax.device_put(0.0)  # JAX lets go of a buffer only at a call some time after it was copied
        time.sleep(1e-4)
    return leaf


def place_stacked(
    layers: Sequence[Callable[[], np.ndarray]], shape: tuple[int, ...], *, dtype: np.dtype, sharding: Sharding | None
) -> jax.Array:
    """A leaf [L, …] filled on its devices, in place; the host holds one layer."""
    stack = jnp.zeros(shape, dtype, device=sharding)
    for i, make in enumerate(layers):
        stack = _setter(sharding)(stack, place(make, _of_layer(sharding)), np.int32(i))
        jax.block_until_ready(stack)  # so that the next layer finds this one's memory
    return stack


def fetch(leaf: Any, layer: int | None = None) -> np.ndarray:
    """The whole leaf, or one layer of a leaf [L, …], on the host of every process."""
    if isinstance(leaf, np.ndarray):
        return leaf if layer is None else leaf[layer]
    if not leaf.is_fully_addressable:
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(_getter(everywhere, layer is None)(leaf, np.int32(layer or 0)))
    if layer is None:
        return np.asarray(leaf)
    return np.asarray(_getter(_of_layer(leaf.sharding), False)(leaf, np.int32(layer)))


def _of_layer(sharding: Sharding | None) -> Sharding | None:
    """The sharding of one layer of a leaf that is stacked over layers."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@functools.cache
def _setter(sharding: Sharding | None) -> Callable[..., jax.Array]:
    def fill(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)

    where: dict[str, Any] = {} if sharding is None else {"out_shardings": sharding}
    return jax.jit(fill, donate_argnums=0, **where)


@functools.cache
def _getter(sharding: Sharding | None, whole: bool) -> Callable[..., jax.Array]:
    def cut(leaf: jax.Array, i: jax.Array) -> jax.Array:
        return leaf if whole else jax.lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False)

    return jax.jit(cut, out_shardings=sharding)
