"""Safetensors files: reads tensors row by row, and writes sharded folders tensor by tensor.

The safetensors library checks the header; since it reads and writes only whole files, the bytes are read and written
here.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from es_jax.weights.files import INDEX, SINGLE, SUMS, weight_map
from es_jax.weights.streaming import FileReader, Shape, StoredTensor, is_plausible, row_slices, widened

_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
_FLOATS = {name: np.dtype(kind) for name, kind in _KINDS.items()}
_NAMES = {dtype.name: name for name, dtype in _FLOATS.items()}
_NUMBERS = 1 << 20  # bytes written at once


class SafetensorsReader(FileReader):
    """The tensors of one or more files. Raises one ValueError that lists every key that is in two files, is not in the
    file that the index names, or is not floating point."""

    def __init__(self, files: Iterable[Path]) -> None:
        tensors: dict[str, StoredTensor] = {}
        problems = []
        listed = weight_map(files) if len(files := list(files)) > 1 else {}
        for file in files:
            fields, base = _header(file)
            for key, field in fields.items():
                if key in tensors:
                    problems.append(f"{file}: {key} is in another file of the model too")
                elif listed.get(key, file.name) != file.name:
                    problems.append(f"{file}: {key} belongs in {listed[key]}, according to {INDEX}")
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
    shapes: Mapping[str, Shape],
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Write `tensor(key)` for every key as `dtype` into one file, or into several and an index, one tensor at a time.

    A file holds at most `max_shard_bytes` of tensors, unless a single tensor is larger. The files' sha256 is written
    next to them. Raises ValueError for numbers that, as `dtype`, would be refused on reading.
    """
    shards: list[dict[str, Shape]] = [{}]
    filled = total = 0
    for key, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = shape
        filled, total = filled + size, total + size
    sums, count = "", len(shards)
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else SINGLE
        sums += f"{_write(folder / name, shard, tensor, dtype=dtype)}  {name}\n"
        file_of |= dict.fromkeys(shard, name)
    (folder / SUMS).write_text(sums, encoding="utf-8")
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header's fields by key, and where the tensors begin. Before the library checks the header against the file,
    this checks that it fits into the file and is JSON."""
    try:
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if 8 + length > (size := file.stat().st_size):
                raise ValueError(f"its header needs {length} bytes, the file has {size}")
            fields = json.loads(content.read(length))
        with safe_open(str(file), framework="np"):
            pass
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}): fetch it again") from None
    except OSError as error:
        raise OSError(f"{file} cannot be read ({error}): check that it is a file and readable") from None
    fields.pop("__metadata__", None)
    return fields, 8 + length


def _write(path: Path, shapes: Mapping[str, Shape], tensor: Callable[[str], np.ndarray], *, dtype: np.dtype) -> str:
    """Write one file; returns its sha256 in hex."""
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
            largest = np.float32(0)
            for rows in row_slices(shape, _NUMBERS):
                with np.errstate(invalid="ignore", over="ignore"):  # found at the end
                    chunk = np.ascontiguousarray(values[rows], dtype)
                    largest = np.maximum(largest, np.abs(widened(chunk)).max())
                put(chunk.view(np.uint8).data)
            if not is_plausible(largest):  # the same check as on reading
                raise ValueError(
                    f"{key} has NaN, infinite or impossibly large or small numbers as {dtype} (the largest is "
                    f"{largest}): write it in a wider dtype, or write other weights"
                )
    return total.hexdigest()
