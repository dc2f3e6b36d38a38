"""The GGUF container: metadata, and tensors by key, dequantised through the `gguf` package.

The layout is that of the format's specification, versions 2 and 3. The header is parsed here because all of it has to
be checked against the file's size before a number is read, and 100 thousand token strings have to be read in well
under a second.
"""

import math
import mmap
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<u1"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_VERSIONS = (2, 3)


class _Tensor(NamedTuple):
    kind: str
    shape: tuple[int, ...]  # [out, in]: the file's dimensions, slowest first
    start: int  # first byte in the file
    nbytes: int
    block: tuple[int, int]  # numbers, and the bytes that hold them


class GGUFReader:
    """`metadata`: key → value; `shapes`: tensor → shape [out, in]; `read(key)`: the tensor.

    Raises ValueError when the file is not whole, little-endian GGUF of one part, or holds kinds of tensors that are not
    read (all of them named).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                self.metadata, self._tensors = _parse(_Cursor(content))
        except (ValueError, struct.error) as error:  # an empty file cannot be mapped: a ValueError as well
            raise ValueError(f"{path} is truncated or corrupt GGUF ({error}); fetch it again") from None
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        parts = self.metadata.get("split.count", 1)
        if parts > 1:
            raise ValueError(
                f"{path} is one of {parts} parts: join them with `llama-gguf-split --merge` and give the sum"
            )
        others = [f"{name} is {tensor.kind}" for name, tensor in self._tensors.items() if tensor.kind not in KINDS]
        if others:
            raise ValueError(f"{path}: {', '.join(others)}, which is not read; known: {', '.join(KINDS)}")

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows `start` to `stop` of the tensor, dequantised to float32; plain floats in their own type.

        Raises ValueError when the file has become shorter since it was opened.
        """
        import gguf

        tensor = self._tensors[key]
        stop = tensor.shape[0] if stop is None else stop
        numbers, size = tensor.block
        shape, row = (stop - start, *tensor.shape[1:]), math.prod(tensor.shape[1:])
        first, count = tensor.start + start * row // numbers * size, math.prod(shape) // numbers * size
        data = np.fromfile(self.path, np.uint8, count=count, offset=first)
        if data.size != count:
            raise ValueError(f"{self.path} has become shorter while it was read; fetch it again")
        if tensor.kind in _PLAIN:
            return data.view(_PLAIN[tensor.kind]).reshape(shape)
        kind = gguf.GGMLQuantizationType[tensor.kind]
        return gguf.quants.dequantize(data.reshape(-1, tensor.shape[-1] // numbers * size), kind).reshape(shape)


class _Cursor:
    """A place in the file's bytes that never passes their end."""

    def __init__(self, content: Any) -> None:
        self.content, self.at = content, 0

    def take(self, count: int) -> bytes:
        if count > len(self.content) - self.at:
            raise ValueError(f"its header needs {count} bytes from byte {self.at} on, the file has {len(self.content)}")
        self.at += count
        return self.content[self.at - count : self.at]

    def numbers(self, kind: str, count: int = 1) -> list[Any]:
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), kind).tolist()

    def number(self, kind: str) -> Any:
        return self.numbers(kind)[0]

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("<u4"), self.number("<u8")
            if inner == _STRING:
                return [self.string() for _ in range(count)]
            return self.scalars(inner, count)
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"a metadata value has the unknown type {kind}")
        values = self.numbers(_SCALARS[kind], count)
        if kind == _BOOL and not set(values) <= {0, 1}:
            raise ValueError("a metadata value that is to be true or false is neither")
        return [bool(value) for value in values] if kind == _BOOL else values


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<u4")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise ValueError(f"it is {'big-endian' if swapped else f'of version {version}'}, which is not read")
    if sys.byteorder != "little":
        raise ValueError("this machine is big-endian, for which dequantisation is not tested")
    tensors, fields = cursor.numbers("<u8", 2)
    metadata = _unique(fields, cursor, lambda: cursor.value(cursor.number("<u4")))
    infos = _unique(tensors, cursor, lambda: _info(cursor))
    return metadata, _placed(infos, cursor, metadata.get("general.alignment", 32))


def _unique(count: int, cursor: _Cursor, read: Callable[[], Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        if name in out:
            raise ValueError(f"{name} stands in it twice")
        out[name] = read()
    return out


def _info(cursor: _Cursor) -> tuple[tuple[int, ...], int, int]:
    """Shape, kind and offset of a tensor."""
    dimensions = cursor.number("<u4")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = tuple(cursor.numbers("<u8", dimensions)[::-1])
    return shape, cursor.number("<u4"), cursor.number("<u8")


def _placed(infos: dict[str, Any], cursor: _Cursor, alignment: Any) -> dict[str, _Tensor]:
    """The tensors, which must lie in the file one after another, without a gap and up to its end."""
    import gguf

    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment = {alignment!r} is no power of two")
    base = end = cursor.at + -cursor.at % alignment
    out = {}
    for name, (shape, number, offset) in infos.items():
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{name} is of the unknown kind {number}") from None
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % numbers or not all(shape):
            raise ValueError(f"{name} has the shape {shape}, which {kind.name} cannot have")
        begins = end + -end % alignment
        if base + offset != begins:
            raise ValueError(f"{name} begins at byte {base + offset}, where {begins} is its place")
        end = begins + math.prod(shape) // numbers * size
        out[name] = _Tensor(kind.name, shape, begins, end - begins, (numbers, size))
    total = len(cursor.content)
    if not end <= total <= end + -end % alignment:
        raise ValueError(f"its header describes {end} bytes, the file has {total}")
    return out
