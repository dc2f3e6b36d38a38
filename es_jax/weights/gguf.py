"""The TransformerConfig that the metadata of a GGUF file describes."""

from typing import Any

import numpy as np

from es_jax.models.config import TransformerConfig
from es_jax.models.families import find_family
from es_jax.weights.gguf_file import GGUFReader

# Metadata that, when present with another value, asks for what the forward pass does not compute.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
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


def from_gguf(reader: GGUFReader) -> TransformerConfig:
    """The TransformerConfig a GGUF file describes.

    Raises ValueError for an unknown architecture, or one that lists every missing field and every field that
    asks for what is not implemented.
    """
    metadata = reader.metadata
    family = find_family(metadata.get("general.architecture", "(missing)"), by="gguf_architecture")
    prefix = family.gguf_architecture + "."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    problems = [f"{prefix}{key} is missing" for key in _SIZES if key not in fields]
    if "token_embd.weight" not in reader.shapes:
        problems.append("the tensor token_embd.weight is missing")
    problems += [
        f"{prefix}{key} = {fields[key]!r} is not implemented (only {' or '.join(map(repr, allowed))} is)"
        for key, allowed in _NEUTRAL.items()
        if key in fields and fields[key] not in allowed
    ]
    if "rope_freqs.weight" in reader.shapes:
        problems.append("the tensor rope_freqs.weight asks for scaled rotary positions, not implemented")
    lists = [key for key in fields if isinstance(fields[key], list)]
    problems += [f"{prefix}{key} differs between layers, not implemented" for key in lists]
    if not problems:
        problems += _head_problems(prefix, fields)
    if problems:
        raise ValueError(f"{reader.path.name}: " + "; ".join(problems))
    values = {ours: _exact(fields[theirs]) for theirs, ours in _SIZES.items()}
    return TransformerConfig(
        family=family.name,
        vocab_size=reader.shapes["token_embd.weight"][0],
        kv_heads=fields.get("attention.head_count_kv", values["heads"]),
        head_dim=_head_dim(fields),
        rope_theta=_exact(fields.get("rope.freq_base", 10000.0)),
        qkv_bias=family.qkv_bias,
        tied_embeddings="output.weight" not in reader.shapes,
        **values,
    )


def _head_dim(fields: dict[str, Any]) -> int:
    return fields.get("attention.key_length", fields["embedding_length"] // fields["attention.head_count"])


def _head_problems(prefix: str, fields: dict[str, Any]) -> list[str]:
    wanted = _head_dim(fields)
    return [
        f"{prefix}{key} = {fields[key]} differs from the head size {wanted}, not implemented"
        for key in ("attention.value_length", "rope.dimension_count")
        if fields.get(key, wanted) != wanted
    ]


def _exact(value: Any) -> Any:
    """GGUF keeps float32: the shortest decimal of it (1e-05, not 9.99999974e-06)."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
