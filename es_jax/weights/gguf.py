"""The TransformerConfig that the metadata of a GGUF file describes."""

import dataclasses
from typing import Any

import numpy as np

from es_jax.models.config import RopeScaling, TransformerConfig, shortest_pattern
from es_jax.models.families import FAMILIES, Family, find_family
from es_jax.models.rope import rope_frequencies
from es_jax.weights.gguf_file import GGUFReader

# Metadata that, when present with another value, asks for what the forward pass does not compute.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear"),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
}
_SIZES = {
    "embedding_length": "width",
    "block_count": "layers",
    "attention.head_count": "heads",
    "feed_forward_length": "mlp_dim",
    "context_length": "max_positions",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
_HEAD_SIZES: tuple[str, ...] = ("attention.value_length", "rope.dimension_count")
_HEAD_SIZES += ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")
_READ = {*_SIZES, *_NEUTRAL, *_HEAD_SIZES, "attention.key_length", "attention.head_count_kv"}
_READ |= {"rope.freq_base", "rope.scaling.factor", "attention.sliding_window"}
_HARMLESS = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
_GEMMA = {"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window_pattern", "rope.freq_base_swa"}
_WIDE_GEMMA = (46, 62)  # layers of the 27B models, whose scores are divided by the root of width / heads
_LLAMA3_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2; the rest of that scaling is the same in both


def from_gguf(reader: GGUFReader) -> TransformerConfig:
    """The TransformerConfig a GGUF file describes.

    What the format leaves to the program that reads it is as in the published models: which layers of a Gemma are
    local and how its scores are scaled, which layers of a SmolLM3 have no rotary positions. A file of the architecture
    llama is a Mistral when it has a sliding window.

    Raises ValueError for an unknown architecture, or one that lists every missing field, every field that asks for
    what is not implemented and every field that is unknown.
    """
    metadata = reader.metadata
    family = find_family(metadata.get("general.architecture", "(missing)"), by="gguf_architecture")
    prefix = family.gguf_architecture + "."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = {key: _exact(value) for key, value in fields.items()}
    if family.name == "llama" and fields.get("attention.sliding_window", 0):
        family = FAMILIES["mistral"]
    problems = _problems(family, fields)
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
        "rope_scaling": _linear(fields),
        "tied_embeddings": "output.weight" not in reader.shapes,
    }
    config = TransformerConfig(family=family.name, **values, **family.flags, **_particulars(family, fields, values))
    return _with_llama3(config, reader) if "rope_freqs.weight" in reader.shapes else config


def _problems(family: Family, fields: dict[str, Any]) -> list[str]:
    prefix = family.gguf_architecture + "."
    known = _READ | _HARMLESS | (_GEMMA if family.windows == "alternating" else set())
    problems = [f"{prefix}{key} is missing" for key in _SIZES if key not in fields]
    problems += [f"{prefix}{key} is not known here" for key in sorted(set(fields) - known)]
    problems += [
        f"{prefix}{key} = {fields[key]!r} is not implemented (only {' or '.join(map(repr, allowed))} is)"
        for key, allowed in _NEUTRAL.items()
        if key in fields and fields[key] not in allowed
    ]
    window = fields.get("attention.sliding_window", 0)
    if window and family.windows not in ("all", "alternating"):
        problems.append(f"{prefix}attention.sliding_window = {window} is not implemented (only 0 is)")
    if family.windows == "alternating" and not window:
        problems.append(f"{prefix}attention.sliding_window is missing")
    lists = [key for key in fields if isinstance(fields[key], list) and key != "attention.sliding_window_pattern"]
    problems += [f"{prefix}{key} differs between layers, not implemented" for key in lists]
    return problems or _head_problems(prefix, fields)


def _particulars(family: Family, fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What only some families have."""
    found: dict[str, Any] = {}
    if family.windows in ("all", "alternating"):
        found["sliding_window"] = fields.get("attention.sliding_window") or None
    if "no_rope_layers" in family.reads:
        found["rope_layers"] = (True, True, True, False)
    if family.windows == "alternating":
        period = fields.get("attention.sliding_window_pattern", family.missing["sliding_window_pattern"])
        every = period if isinstance(period, list) else [(i + 1) % period != 0 for i in range(values["layers"])]
        found["local_layers"] = shortest_pattern([bool(local) for local in every])
        wide = values["layers"] in _WIDE_GEMMA
        found["query_pre_attn_scalar"] = values["width"] // values["heads"] if wide else values["head_dim"]
        caps = {"attn_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"}
        found |= {ours: fields.get(key, family.missing.get(key)) for ours, key in caps.items()}
    if "rope_local_base_freq" in family.reads:
        found["local_rope_theta"] = fields.get("rope.freq_base_swa", family.missing["rope_local_base_freq"])
    return found


def _linear(fields: dict[str, Any]) -> RopeScaling | None:
    factor = fields.get("rope.scaling.factor", 1.0)
    return RopeScaling("linear", factor) if fields.get("rope.scaling.type") == "linear" and factor != 1.0 else None


def _with_llama3(config: TransformerConfig, reader: GGUFReader) -> TransformerConfig:
    """The config whose frequencies are those of the file, which holds only what they are divided by."""
    found = reader.read("rope_freqs.weight")
    for factor in _LLAMA3_FACTORS:
        scaled = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", factor))
        divisors = rope_frequencies(config) / rope_frequencies(scaled)
        if found.shape == divisors.shape and np.allclose(found, divisors, rtol=1e-4, atol=0):
            return scaled
    known = " or ".join(map(str, _LLAMA3_FACTORS))
    raise ValueError(
        f"{reader.path.name}: the tensor rope_freqs.weight scales rotary positions otherwise than Llama 3 with factor "
        f"{known}, not implemented; load the model's safetensors folder instead"
    )


def _head_dim(fields: dict[str, Any]) -> int:
    return fields.get("attention.key_length", fields["embedding_length"] // fields["attention.head_count"])


def _head_problems(prefix: str, fields: dict[str, Any]) -> list[str]:
    wanted = _head_dim(fields)
    return [
        f"{prefix}{key} = {fields[key]} differs from the head size {wanted}, not implemented"
        for key in _HEAD_SIZES
        if fields.get(key, wanted) != wanted
    ]


def _exact(value: Any) -> Any:
    """GGUF keeps float32: the shortest decimal of it (1e-05, not 9.99999974e-06)."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
