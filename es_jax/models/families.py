"""What differs between model families: config fields, names of weights in files. One record a family."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from es_jax.core.names import unknown
from es_jax.models.config import TransformerConfig

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where one parameter lives: its path in the tree, its key in Hugging Face and GGUF files ({}: layer)."""

    path: str
    hf: str
    gguf: str
    transpose: bool = False  # files hold [out, in], the tree holds [in, out]
    rotary: str = ""  # config field with the number of heads, for the rows that rotary positions turn


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints. `fixed`: config.json field → the only value this code computes."""

    name: str  # model_type in config.json
    architecture: str
    gguf_architecture: str
    qkv_bias: bool
    gguf_permuted: bool  # GGUF files interleave the rows of q and k within each head
    fixed: Mapping[str, Any]


WEIGHTS = (
    Weight("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    Weight("layers/attn_norm/scale", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    Weight(
        "layers/attn/q/kernel",
        "model.layers.{}.self_attn.q_proj.weight",
        "blk.{}.attn_q.weight",
        True,
        "heads",
    ),
    Weight("layers/attn/q/bias", "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias", False, "heads"),
    Weight(
        "layers/attn/k/kernel",
        "model.layers.{}.self_attn.k_proj.weight",
        "blk.{}.attn_k.weight",
        True,
        "kv_heads",
    ),
    Weight("layers/attn/k/bias", "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias", False, "kv_heads"),
    Weight("layers/attn/v/kernel", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", True),
    Weight("layers/attn/v/bias", "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    Weight("layers/attn/o/kernel", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", True),
    Weight("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    Weight("layers/mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", True),
    Weight("layers/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", True),
    Weight("layers/mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", True),
    Weight("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    Weight("head/kernel", "lm_head.weight", "output.weight", True),
)

# The same for both families; a missing field counts as the value here, as it does in Hugging Face's format.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "quantization_config": None,
    "auto_map": None,
}
_FIXED |= {"partial_rotary_factor": 1.0, "rope_interleaved": False, "logits_soft_cap": None}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            gguf_architecture="llama",
            qkv_bias=False,
            gguf_permuted=True,
            fixed={**_FIXED, "attention_bias": False, "mlp_bias": False, "sliding_window": None},
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            gguf_architecture="qwen2",
            qkv_bias=True,
            gguf_permuted=False,
            fixed={**_FIXED, "use_sliding_window": False},
        ),
    )
}

# config.json field → TransformerConfig field
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_positions",
}
_OPTIONAL = ("num_key_value_heads", "head_dim")  # the format derives them from the others

# Fields that do not change what a forward pass computes, or that are read elsewhere.
_HARMLESS = {
    *(
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "use_cache",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "attention_dropout",
        "pretraining_tp",
    ),
    *(
        "tie_word_embeddings",
        "rope_theta",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "max_window_layers",
    ),
    *(
        "return_dict",
        "id2label",
        "label2id",
        "chunk_size_feed_forward",
        "is_llama_config",
        "transformers.js_config",
    ),
}


def weights_of(config: TransformerConfig) -> tuple[Weight, ...]:
    """The rows of `WEIGHTS` that this config has: biases with qkv_bias, a head unless it is tied."""

    def has(weight: Weight) -> bool:
        absent = weight.path.endswith("/bias") and not config.qkv_bias
        return not absent and not (weight.path.startswith("head/") and config.tied_embeddings)

    return tuple(weight for weight in WEIGHTS if has(weight))


def find_family(name: str, *, by: str = "name") -> Family:
    """The family whose field `by` (name, architecture, gguf_architecture) is `name`.

    >>> find_family("LlamaForCausalLM", by="architecture").name
    'llama'

    Raises ValueError that names the nearest known ones.
    """
    known = {getattr(family, by): family for family in FAMILIES.values()}
    if name not in known:
        raise ValueError(unknown(f"model {by}", name, known))
    return known[name]


def from_hf(fields: Mapping[str, Any]) -> TransformerConfig:
    """The TransformerConfig of a Hugging Face config.json, given as a dict.

    Missing num_key_value_heads, head_dim, rope_theta (10000) and tie_word_embeddings (False) mean what they
    mean in that format. Raises one ValueError for an unknown architecture, or that lists every missing field
    and every field asking for what is not implemented (scaled rotary positions, sliding windows, quantised
    weights, own code, …). Fields unknown here are logged.
    """
    family = find_family(fields.get("model_type", "(missing)"))
    architecture = (fields.get("architectures") or [family.architecture])[0]
    find_family(architecture, by="architecture")
    problems = _not_implemented(family, fields)
    missing = [key for key in _SIZES if fields.get(key) is None and key not in _OPTIONAL]
    problems += [f"{key} is missing" for key in missing]
    theta, rope_problems = _rope(fields)
    problems += rope_problems
    if problems:
        raise ValueError(f"config.json of a {family.name} model: " + "; ".join(problems))
    _report_unread(family, fields)
    values = {ours: fields[theirs] for theirs, ours in _SIZES.items() if fields.get(theirs) is not None}
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_dim", values["width"] // values["heads"])
    return TransformerConfig(
        family=family.name,
        rope_theta=theta,
        qkv_bias=family.qkv_bias,
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        **values,
    )


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """config.json's fields for `config`: the inverse of `from_hf`, read by transformers 4 and 5 alike."""
    family = FAMILIES[config.family]
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
    }


def _not_implemented(family: Family, fields: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, only in family.fixed.items():
        value = fields.get(key, only)
        plain_rope = key == "rope_scaling" and _rope_type(value) == "default"
        if value != only and not plain_rope and not (value is None and only is False):
            problems.append(f"{key} = {value!r} is not implemented (only {only!r} is)")
    kinds = sorted(set(fields.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        problems.append(f"layer_types contains {kinds}, not implemented (only 'full_attention' is)")
    return problems


def _rope_type(value: Any) -> str:
    if not isinstance(value, Mapping):
        return "default" if value is None else repr(value)
    return str(value.get("rope_type", value.get("type", "(missing)")))


def _rope(fields: Mapping[str, Any]) -> tuple[float, list[str]]:
    """rope_theta from either of its two places, and what is wrong with them."""
    inner = fields.get("rope_parameters") or {}
    problems = []
    if inner and _rope_type({"rope_type": "default", **inner}) != "default":
        problems.append(f"rope_parameters.rope_type = {inner['rope_type']!r} is not implemented (only 'default' is)")
    extra = {k: v for k, v in inner.items() if k not in ("rope_type", "type", "rope_theta")}
    if extra.get("partial_rotary_factor") == 1.0:
        del extra["partial_rotary_factor"]
    if extra and not problems:
        problems.append(f"rope_parameters has {extra}, not implemented (only rope_type and rope_theta are)")
    outer = fields.get("rope_theta")
    theta = inner.get("rope_theta", outer)
    if outer is not None and theta != outer:
        problems.append(f"rope_theta = {outer} contradicts rope_parameters.rope_theta = {theta}: remove one")
    return float(10000.0 if theta is None else theta), problems


def _report_unread(family: Family, fields: Mapping[str, Any]) -> None:
    known = {*_HARMLESS, *_SIZES, *family.fixed}
    unread = sorted(key for key, value in fields.items() if key not in known and value not in (None, False, "", {}))
    if unread:
        log.warning("config.json: fields this code does not read: %s", ", ".join(unread))
