"""Safetensors files, through the library of that name: which files a folder has, one tensor at a time."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsReader:
    """The tensors of one or more files. `shapes`: key → shape; `read(key)`: a copy of one tensor.

    Raises ValueError for a file that is not whole, a key that stands in two files, or a tensor of another kind than
    floating point.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            handle = _open(file)
            for key in handle.keys():  # noqa: SIM118
                tensor = handle.get_slice(key)
                if key in self._where:
                    raise ValueError(f"{file}: {key} stands in another file of the model too; fetch the model again")
                if tensor.get_dtype() not in _FLOATS:
                    known = ", ".join(_FLOATS)
                    raise ValueError(f"{file}: {key} has dtype {tensor.get_dtype()}, which is not read; known: {known}")
                self._where[key], self.shapes[key] = handle, tuple(tensor.get_shape())

    def read(self, key: str) -> np.ndarray:
        """The tensor, in the file's dtype."""
        return self._where[key].get_tensor(key)


def find_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a Hugging Face folder: every shard of the index, or model.safetensors.

    Raises FileNotFoundError when there are none (saying how to convert .bin files) or shards are missing.
    """
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error!r}): fetch the model again") from None
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
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one file that Hugging Face's tools read."""
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata={"format": "pt"})


def digest(files: Iterable[Path]) -> str:
    """sha256, in hex, of the files' bytes one after another in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                total.update(chunk)
    return total.hexdigest()


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}): fetch it again") from None
