"""GGUF files, versions 2 and 3: their metadata and tensors, and the TransformerConfig that the metadata describes.

The `gguf` package dequantises. The header is parsed here, so that all of it is checked against the file's size before a
number is read, and 100 thousand token strings are read in well under a second.
"""

import dataclasses
import math
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from es_jax.models.config import MOST_LAYERS, RopeScaling, TransformerConfig, shortest_pattern
from es_jax.models.families import FAMILIES, Family, find_family
from es_jax.models.rope import rope_frequencies
from es_jax.weights.streaming import FileReader, Shape, StoredTensor

Fields = dict[str, Any]
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<u1"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_VERSIONS = (2, 3)
# Metadata with the only values that the forward pass implements.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear"),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
}
_SIZES = {
    "embedding_length": "width", "block_count": "layers", "attention.head_count": "heads",
    "feed_forward_length": "mlp_dim", "context_length": "max_positions", "attention.layer_norm_rms_epsilon": "norm_eps",
}  # fmt: skip
_HEAD_SIZES = (
    "attention.value_length", "rope.dimension_count",
    "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa",
)  # fmt: skip
_KNOWN = {*_SIZES, *_NEUTRAL, *_HEAD_SIZES, "attention.key_length", "attention.head_count_kv"}
_KNOWN |= {"rope.freq_base", "rope.scaling.factor", "attention.sliding_window"}
_KNOWN |= {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}  # which have no effect here
_GEMMA = {"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window_pattern", "rope.freq_base_swa"}
_WIDE_GEMMA = (46, 62)  # layers of the 27B models, which divide scores by sqrt(width / heads)
_LLAMA3_FACTORS = (8.0, 32.0)  # factors of Llama 3.1 and 3.2, which differ in nothing else


class GGUFReader(FileReader):
    """`metadata`: key → value; the tensors' shapes are [out, in]. Raises ValueError unless the file is complete,
    little-endian GGUF in one part. If it has tensors of kinds that are not read, the message names all of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                self.metadata, tensors = _parse(path, _Header(content))
        except ValueError as error:  # an empty file cannot be mapped: a ValueError too
            raise ValueError(f"{path} is truncated or corrupt GGUF ({error}); fetch it again") from None
        super().__init__(tensors)
        if (parts := self.metadata.get("split.count", 1)) > 1:
            join = "join them with `llama-gguf-split --merge` and give the joined file"
            raise ValueError(f"{path} is one of {parts} parts: {join}")
        kinds = {name: tensor.kind.name for name, tensor in tensors.items() if not isinstance(tensor.kind, np.dtype)}
        if others := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in KINDS]:
            raise ValueError(
                f"{path} has tensors of kinds that are not read: {', '.join(others)}; use a file with kinds among "
                f"{', '.join(KINDS)}"
            )


class _Header:
    """Reads the header of a file value by value, never past the file's end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.size = content, len(content)

    def take(self, count: int) -> bytes:
        start = self.content.tell()
        if count > self.size - start:
            raise ValueError(f"its header needs {count} bytes from byte {start} on, the file has {self.size}")
        return self.content.read(count)

    def numbers(self, kind: str, count: int) -> list[Any]:
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), kind).tolist()

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return self.take(self.integer(8)).decode()

    def value(self) -> Any:
        kind = self.integer(4)
        return self.values(self.integer(4), self.integer(8)) if kind == _ARRAY else self.values(kind, 1)[0]

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a metadata value has the unknown type {kind}")
        values = self.numbers(_SCALARS[kind], count)
        if kind == _BOOL and not set(values) <= {0, 1}:
            raise ValueError("a metadata value that is to be true or false is neither")
        return list(map(bool, values)) if kind == _BOOL else values

    def tensor(self) -> tuple[Shape, int, int]:
        """Shape, kind and offset."""
        dimensions = self.integer(4)
        if not 1 <= dimensions <= 4:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        return tuple(self.numbers("<u8", dimensions)[::-1]), self.integer(4), self.integer(8)

    def unique(self, count: int, read: Callable[[], Any]) -> Fields:
        """`count` names, each with the value that `read` reads after it."""
        entries: Fields = {}
        for _ in range(count):
            name = self.string()
            if name in entries:
                raise ValueError(f"{name} occurs twice")
            entries[name] = read()
        return entries


def _parse(path: Path, header: _Header) -> tuple[Fields, dict[str, StoredTensor]]:
    """The metadata and the tensors. The tensors must follow one another without a gap, up to the end of the file."""
    import gguf

    if header.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = header.integer(4)
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise ValueError(f"it is {'big-endian' if swapped else f'of version {version}'}, which is not read")
    if sys.byteorder != "little":
        raise ValueError("this machine is big-endian, and dequantisation is not tested on such machines")
    tensors, fields = header.numbers("<u8", 2)
    metadata, infos = header.unique(fields, header.value), header.unique(tensors, header.tensor)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment = {alignment!r} is not a power of two")
    base = header.content.tell()
    base = end = base + -base % alignment
    stored = {}
    for name, (shape, number, offset) in infos.items():
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{name} is of the unknown kind {number}") from None
        block = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block[0] or not all(shape):
            raise ValueError(f"{name} has the shape {shape}, which {kind.name} cannot have")
        start = end + -end % alignment
        if base + offset != start:
            raise ValueError(f"{name} begins at byte {base + offset} instead of {start}")
        stored[name] = StoredTensor(path, shape, start, _PLAIN.get(kind.name, kind), block)
        end = start + math.prod(shape) // block[0] * block[1]
    if not end <= header.size <= end + -end % alignment:
        raise ValueError(f"its header describes {end} bytes, the file has {header.size}")
    return metadata, stored


def from_gguf(reader: GGUFReader) -> TransformerConfig:
    """The TransformerConfig a GGUF file describes.

    Where the format does not say, it takes the values of the published models: which layers of a Gemma are local, how
    its scores are scaled, and which layers of a SmolLM3 have no rotary positions. A llama with a sliding window is a
    Mistral. Raises one ValueError that lists every field that is missing, unknown or not implemented.
    """
    metadata = reader.metadata
    family = find_family(metadata.get("general.architecture", "(missing)"), by="gguf_architecture")
    prefix = family.gguf_architecture + "."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key, value in fields.items():
        if isinstance(value, float):  # GGUF stores float32: take its shortest decimal (1e-05, not 9.99999974e-06)
            fields[key] = float(str(np.float32(value)))
    if family.name == "llama" and fields.get("attention.sliding_window", 0):
        family = FAMILIES["mistral"]
    problems = [prefix + problem for problem in _problems(family, fields)]
    if "token_embd.weight" not in reader.shapes:
        problems.append("the tensor token_embd.weight is missing")
    if problems:
        raise ValueError(f"{reader.path.name}: " + "; ".join(problems))
    values = {ours: fields[theirs] for theirs, ours in _SIZES.items()}
    values |= {
        "vocab_size": reader.shapes["token_embd.weight"][0],
        "kv_heads": fields.get("attention.head_count_kv", values["heads"]),
        "head_dim": _head_dim(fields),
        "rope_theta": fields.get("rope.freq_base", 10000.0),
        "tied_embeddings": "output.weight" not in reader.shapes,
        "sliding_window": fields.get("attention.sliding_window") or None,
    }
    factor = fields.get("rope.scaling.factor", 1.0)
    if fields.get("rope.scaling.type") == "linear" and factor != 1.0:
        values["rope_scaling"] = RopeScaling("linear", factor)
    if "no_rope_layers" in family.reads:
        values["rope_layers"] = (True, True, True, False)
    if family.windows == "alternating":
        period = fields.get("attention.sliding_window_pattern", family.missing["sliding_window_pattern"])
        local = (
            period
            if isinstance(period, list)
            else [(i + 1) % period != 0 for i in range(min(values["layers"], MOST_LAYERS))]
        )
        wide = values["layers"] in _WIDE_GEMMA
        values["local_layers"] = shortest_pattern(list(map(bool, local)))
        values["query_pre_attn_scalar"] = values["width"] // values["heads"] if wide else values["head_dim"]
        for ours, key in ("attn_softcap", "attn_logit_softcapping"), ("final_softcap", "final_logit_softcapping"):
            values[ours] = fields.get(key, family.missing.get(key))
    if "rope_local_base_freq" in family.reads:
        values["local_rope_theta"] = fields.get("rope.freq_base_swa", family.missing["rope_local_base_freq"])
    config = TransformerConfig(family=family.name, **values, **family.flags)
    return _with_llama3(config, reader) if "rope_freqs.weight" in reader.shapes else config


def _problems(family: Family, fields: Fields) -> list[str]:
    window, alternating = fields.get("attention.sliding_window", 0), family.windows == "alternating"
    known = _KNOWN | (_GEMMA if alternating else set())
    problems = [f"{key} is missing" for key in _SIZES if key not in fields]
    problems += [f"{key} is not known here" for key in sorted(set(fields) - known)]
    problems += [
        f"{key} = {fields[key]!r} is not implemented (only {' or '.join(map(repr, allowed))} is)"
        for key, allowed in _NEUTRAL.items()
        if key in fields and fields[key] not in allowed
    ]
    if window and not alternating and family.windows != "all":
        problems.append(f"attention.sliding_window = {window} is not implemented (only 0 is)")
    if alternating and not window:
        problems.append("attention.sliding_window is missing")
    problems += [
        f"{key} differs between layers, which is not implemented"
        for key, value in fields.items()
        if isinstance(value, list) and key != "attention.sliding_window_pattern"
    ]
    return problems or [
        f"{key} = {fields[key]} differs from the head size {_head_dim(fields)}, which is not implemented"
        for key in _HEAD_SIZES
        if fields.get(key, _head_dim(fields)) != _head_dim(fields)
    ]


def _head_dim(fields: Fields) -> int:
    return fields.get("attention.key_length", fields["embedding_length"] // fields["attention.head_count"])


def _with_llama3(config: TransformerConfig, reader: GGUFReader) -> TransformerConfig:
    """The config with the rotary frequencies of the file, which stores only their divisors."""
    divisors = reader.read("rope_freqs.weight")
    for factor in _LLAMA3_FACTORS:
        scaled = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", factor))
        expected = rope_frequencies(config) / rope_frequencies(scaled)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4, atol=0):
            return scaled
    raise ValueError(
        f"{reader.path.name}: the tensor rope_freqs.weight does not scale rotary positions like Llama 3 with factor "
        f"{' or '.join(map(str, _LLAMA3_FACTORS))}, and no other scaling is implemented; load the model's safetensors "
        "folder instead"
    )
