"""Safetensors files: their tensors row by row, and sharded folders written tensor by tensor.

The library of that name checks the header against the file; the bytes are read and written here, because it maps whole
files into memory, and takes whole files from memory.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from es_jax.weights.files import INDEX, SINGLE, SUMS
from es_jax.weights.streaming import FileReader, StoredTensor, row_slices

_FLOATS = {
    name: np.dtype(kind)
    for name, kind in {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}.items()
}
_NAMES = {dtype.name: name for name, dtype in _FLOATS.items()}
_NUMBERS = 1 << 20  # that are written at once


class SafetensorsReader(FileReader):
    """The tensors of one or more files.

    Raises ValueError for a file that is not whole, or one that lists every key that stands in two files or has another
    kind of number than floating point.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        tensors: dict[str, StoredTensor] = {}
        problems = []
        for file in files:
            fields, base = _header(file)
            for key, field in fields.items():
                if key in tensors:
                    problems.append(f"{file}: {key} stands in another file of the model too")
                elif field["dtype"] not in _FLOATS:
                    problems.append(f"{file}: {key} has dtype {field['dtype']}, which is not read")
                else:
                    start, dtype = base + field["data_offsets"][0], _FLOATS[field["dtype"]]
                    tensors[key] = StoredTensor(file, tuple(field["shape"]), start, dtype, (1, dtype.itemsize))
        if problems:
            known = ", ".join(_FLOATS)
            raise ValueError("; ".join(problems) + f": fetch the model again, or convert it to one of {known}")
        super().__init__(tensors)


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> tuple[Path, ...]:
    """Write `tensor(key)` of every key as `dtype` into one file, or several and an index; one tensor at a time.

    A file holds at most `max_shard_bytes` of tensors, more only where a single tensor does. Their sums are written
    beside them. Returns the files.
    """
    sizes = {key: math.prod(shape) * dtype.itemsize for key, shape in shapes.items()}
    shards = list(_shards(sizes, max_shard_bytes))
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    keys_of = dict(zip(names, shards, strict=True))
    sums = {
        name: _write(folder / name, {key: shapes[key] for key in keys}, tensor, dtype=dtype)
        for name, keys in keys_of.items()
    }
    text = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    (folder / SUMS).write_text(text, encoding="utf-8")
    if count > 1:
        file_of = {key: name for name, keys in keys_of.items() for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return tuple(folder / name for name in names)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header's fields by key, and where the tensors begin. The library has checked them against the file."""
    try:
        with safe_open(str(file), framework="np"), open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            fields = json.loads(content.read(length))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}): fetch it again") from None
    except OSError as error:
        raise OSError(f"{file} cannot be read ({error}): see that it is a file and readable") from None
    fields.pop("__metadata__", None)
    return fields, 8 + length


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    keys: list[str] = []
    filled = 0
    for key, size in sizes.items():
        if keys and filled + size > limit:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += size
    yield keys


def _write(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], np.ndarray], *, dtype: np.dtype
) -> str:
    """Write one file; gives its sha256 in hex."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        fields[key] = {"dtype": _NAMES[dtype.name], "shape": shape, "data_offsets": (start, end)}
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    total = hashlib.sha256()
    with open(path, "wb") as file:

        def put(content: bytes | memoryview) -> None:
            file.write(content)
            total.update(content)

        put(len(header).to_bytes(8, "little") + header)
        for key, shape in shapes.items():
            values = tensor(key)
            if values.shape != shape:
                raise ValueError(f"{key} has the shape {values.shape}, the header says {shape}")
            for rows in row_slices(shape, _NUMBERS):
                put(np.ascontiguousarray(values[rows], dtype).view(np.uint8).data)
    return total.hexdigest()
