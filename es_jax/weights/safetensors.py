"""Safetensors files: which ones a folder has, their tensors row by row, and sharded folders written tensor by tensor.

The library of that name checks the header against the file; the bytes are read and written here, because it maps whole
files into memory, and takes whole files from memory.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from es_jax.weights.checksums import write_sums

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype.name: name for name, dtype in _FLOATS.items()}
_ROWS = 1 << 20  # numbers that are written at once


class _Tensor(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # first byte in the file


class SafetensorsReader:
    """The tensors of one or more files. `shapes`: key → shape; `read(key)`: one tensor, or some rows of it.

    Raises ValueError for a file that is not whole, or one that lists every key that stands in two files or has another
    kind of number than floating point.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._tensors: dict[str, _Tensor] = {}
        problems = []
        for file in files:
            fields, base = _header(file)
            for key, field in fields.items():
                if key in self._tensors:
                    problems.append(f"{file}: {key} stands in another file of the model too")
                elif field["dtype"] not in _FLOATS:
                    problems.append(f"{file}: {key} has dtype {field['dtype']}, which is not read")
                else:
                    start = base + field["data_offsets"][0]
                    self._tensors[key] = _Tensor(file, _FLOATS[field["dtype"]], tuple(field["shape"]), start)
        if problems:
            known = ", ".join(_FLOATS)
            raise ValueError("; ".join(problems) + f": fetch the model again, or convert it to one of {known}")
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows `start` to `stop` of the tensor, in the file's dtype.

        Raises ValueError when the file has become shorter since it was opened.
        """
        tensor = self._tensors[key]
        stop = tensor.shape[0] if stop is None else stop
        shape, row = (stop - start, *tensor.shape[1:]), math.prod(tensor.shape[1:])
        count, first = math.prod(shape), tensor.start + start * row * tensor.dtype.itemsize
        data = np.fromfile(tensor.file, np.uint8, count=count * tensor.dtype.itemsize, offset=first)
        if data.size != count * tensor.dtype.itemsize:
            raise ValueError(f"{tensor.file} has become shorter while it was read; fetch it again")
        return data.view(tensor.dtype).reshape(shape)


def find_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a Hugging Face folder: every shard of the index, or model.safetensors.

    Raises FileNotFoundError when there are none (saying how to convert .bin files) or shards are missing, ValueError
    when the index is damaged or names files outside the folder.
    """
    if (folder / INDEX).exists():
        names = _indexed(folder / INDEX)
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: shards named in {INDEX} are missing: {', '.join(missing)}")
        return tuple(folder / name for name in names)
    if (folder / SINGLE).exists():
        return (folder / SINGLE,)
    if any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has weights only as .bin files, which are pickles and are not read; convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    inside = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; it has {', '.join(inside)}: give the path of one of them" if inside else ""
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")


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
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    sums = {
        name: _write(folder / name, {key: shapes[key] for key in keys}, tensor, dtype=dtype)
        for name, keys in zip(names, shards, strict=True)
    }
    write_sums(folder, sums)
    if len(shards) > 1:
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return tuple(folder / name for name in names)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one file of tensors that share a dtype, as Hugging Face's tools read it."""
    (dtype,) = {tensor.dtype for tensor in tensors.values()}
    _write(path, {key: tensor.shape for key, tensor in tensors.items()}, tensors.__getitem__, dtype=dtype)


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


def _indexed(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): fetch the model again") from None
    if outside:
        raise ValueError(f"{path} names files outside its folder ({', '.join(outside)}): fetch the model again")
    return names


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

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            total.update(data)

        put(len(header).to_bytes(8, "little") + header)
        for key, shape in shapes.items():
            values = tensor(key)
            if values.shape != shape:
                raise ValueError(f"{key} has the shape {values.shape}, the header says {shape}")
            rows = max(_ROWS // max(math.prod(shape[1:]), 1), 1)
            for at in range(0, shape[0], rows):
                put(np.ascontiguousarray(values[at : at + rows], dtype).view(np.uint8).data)
    return total.hexdigest()
