"""Converts config.json to TransformerConfig and back. Every field is read, known to have no effect, or refused by
name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from es_jax.core.names import unknown
from es_jax.models.config import MOST_LAYERS, RopeScaling, TransformerConfig, shortest_pattern
from es_jax.models.families import FAMILIES, Family, find_family

Fields = Mapping[str, Any]

# config.json field → TransformerConfig field
_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps", "max_position_embeddings": "max_positions",
}  # fmt: skip
_DERIVED = ("num_key_value_heads", "head_dim")  # null: as many as heads; hidden_size / heads
_READ = {
    "model_type", "architectures", "tie_word_embeddings", "layer_types", "sliding_window", "rope_theta", "rope_scaling",
    "rope_parameters",
}  # fmt: skip
_WINDOW_FIELDS = {"late": {"use_sliding_window", "max_window_layers"}, "alternating": {"sliding_window_pattern"}}
_KINDS = ("full_attention", "sliding_attention")  # kinds of layers; the second is local

# Fields without effect on the forward pass; some are read elsewhere (token ids), others never (generation).
_HARMLESS = {
    "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path", "use_cache",
    "cache_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "prefix", "initializer_range", "attention_dropout",
    "hidden_dropout", "pretraining_tp", "max_window_layers", "return_dict",
    "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "finetuning_task",
    "task_specific_params", "chunk_size_feed_forward", "torchscript", "is_llama_config", "transformers.js_config",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "unsloth_fixed",
    "unsloth_version", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams",
    "num_return_sequences",
}  # fmt: skip
# rope_type → its numbers, in the order of RopeScaling
_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def from_hf(fields: Fields) -> TransformerConfig:
    """The TransformerConfig of a Hugging Face config.json, given as a dict.

    A missing field has its default in the family's class in transformers; sizes are required. Raises ValueError for an
    unknown architecture, or one ValueError that lists every missing field, every field that is not implemented (other
    rotary scalings, quantised weights, custom code, …) and every unknown field.
    """
    family = find_family(fields.get("model_type", "(missing)"))
    architecture = fields.get("architectures") or family.architecture
    architecture = architecture if isinstance(architecture, str) else architecture[0]
    if find_family(architecture, by="architecture") is not family:
        raise ValueError(
            f"config.json: architectures = {architecture} does not belong to model_type = {family.name}: correct one "
            "of them"
        )
    complete = {**family.missing, **fields}
    problems = _field_problems(family, fields)
    values = _sizes(complete, problems) | _rope(family, fields, problems)
    if isinstance(values.get("layers"), int) and values["layers"] <= MOST_LAYERS:
        values |= _layers(family, complete, values["layers"], problems)
    if problems:
        raise ValueError(f"config.json of a {family.name} model: " + "; ".join(problems))
    values = {ours: complete.get(theirs) for theirs, ours in family.reads.items()} | values
    values["tied_embeddings"] = bool(complete.get("tie_word_embeddings"))
    return TransformerConfig(family=family.name, **family.flags, **values)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """config.json's fields for `config`: the inverse of `from_hf`, read by transformers 4 and 5 alike.

    Raises ValueError for a config with fields that its family's config.json cannot express.
    """
    family = FAMILIES[config.family]
    rope = _rope_fields(config.rope_theta, config.rope_scaling)
    fields = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        **{key: family.fixed[key] for key in ("hidden_act", "hidden_activation") if key in family.fixed},
        **{theirs: getattr(config, ours) for theirs, ours in family.reads.items()},
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_embeddings,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config.local_rope_theta is not None:
        fields["rope_parameters"] = dict(zip(_KINDS, (rope, _rope_fields(config.local_rope_theta, None)), strict=True))
    if "rope_layers" in family.reads.values():
        fields["no_rope_layers"] = [int(rope) for _, rope in config.layer_kinds]
    local = [is_local for is_local, _ in config.layer_kinds]
    if family.windows != "none":
        fields["sliding_window"] = config.sliding_window
    if family.windows == "late":
        first = local.index(True) if True in local else config.layers
        fields |= {"use_sliding_window": any(local), "max_window_layers": first}
    if family.windows in _WINDOW_FIELDS:
        fields["layer_types"] = [_KINDS[is_local] for is_local in local]
    back = from_hf(fields)
    if config.layer_kinds == back.layer_kinds:  # a pattern can be written in several ways
        back = dataclasses.replace(back, rope_layers=config.rope_layers, local_layers=config.local_layers)
    ours, theirs = vars(config), vars(back)
    if lost := [f"{name} = {ours[name]!r}" for name in ours if ours[name] != theirs[name]]:
        raise ValueError(
            f"config.json of a {family.name} model cannot express {', '.join(lost)}: change these fields, or the family"
        )
    return fields


def _rope_fields(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    kind, *numbers = ("default",) if scaling is None else dataclasses.astuple(scaling)
    return {"rope_type": kind, "rope_theta": theta, **dict(zip(_SCALINGS[kind], numbers, strict=False))}


def _field_problems(family: Family, fields: Fields) -> list[str]:
    """The fields that are not implemented or unknown."""
    problems = [
        f"{key} = {fields[key]!r} is not implemented (only {only!r} is)"
        for key, only in family.fixed.items()
        if fields.get(key, only) != only and not (fields[key] is None and only is False)
    ]
    windows = _WINDOW_FIELDS.get(family.windows, ())
    known = _READ.union(_HARMLESS, windows, _SIZES, family.fixed, family.reads, family.missing)
    if "layer_types" in fields:
        known.add("_sliding_window_pattern")  # transformers writes both and follows layer_types
    return problems + [
        f"{key} = {fields[key]!r} is not known here; remove it if it does not change what the model computes"
        for key in sorted(fields.keys() - known)
    ]


# The functions below return fields of TransformerConfig, and append errors in config.json to `problems`.
def _sizes(fields: Fields, problems: list[str]) -> dict[str, Any]:
    problems += [f"{key} is missing" for key in _SIZES if fields.get(key) is None and key not in _DERIVED]
    values = {ours: fields[theirs] for theirs, ours in _SIZES.items() if fields.get(theirs) is not None}
    for theirs, ours in _SIZES.items():
        value, fraction = values.get(ours, 0), ours == "norm_eps"
        if isinstance(value, bool) or not isinstance(value, int | float if fraction else int):
            problems.append(f"{theirs} = {value!r} is not {'a number' if fraction else 'a whole number'}")
    if not problems:
        values.setdefault("kv_heads", values["heads"])
        values.setdefault("head_dim", values["width"] // max(values["heads"], 1))
    return values


def _layers(family: Family, fields: Fields, layers: int, problems: list[str]) -> dict[str, Any]:
    """Which layers are local and which have rotary positions, as patterns."""
    values: dict[str, Any] = {}
    if "no_rope_layers" in family.reads:
        every = fields["no_rope_layer_interval"]
        turned = fields["no_rope_layers"] or [(i + 1) % every != 0 for i in range(layers)]
        if len(turned) < layers:
            problems.append(f"no_rope_layers has {len(turned)} entries for {layers} layers")
        values["rope_layers"] = shortest_pattern([bool(turn) for turn in turned[:layers]])
    unused = family.windows == "none" or (family.windows == "late" and not fields.get("use_sliding_window"))
    window = None if unused else fields.get("sliding_window")
    if family.windows == "alternating":
        local = [(i + 1) % fields["sliding_window_pattern"] != 0 for i in range(layers)]
    else:
        first = fields["max_window_layers"] if family.windows == "late" else 0
        local = [window is not None and i >= first for i in range(layers)]
    kinds = fields.get("layer_types") or [_KINDS[is_local] for is_local in local]
    local = [kind == "sliding_attention" for kind in kinds]
    wrong = ""
    if strange := sorted(set(kinds) - set(_KINDS)):
        wrong = f"contains {strange}, which is not implemented"
    elif len(kinds) != layers:
        wrong = f"has {len(kinds)} entries for {layers} layers"
    elif any(local) and window is None:
        wrong = "contains 'sliding_attention' but no sliding_window is in use"
    elif family.windows == "all" and window is not None and not all(local):
        wrong = f"contains 'full_attention', but in a {family.name} model every layer has the window"
    if wrong:
        problems.append(f"layer_types {wrong}")
    elif any(local):
        values |= {"sliding_window": window, "local_layers": shortest_pattern(local)}
    return values


def _rope(family: Family, fields: Fields, problems: list[str]) -> dict[str, Any]:
    """rope_theta and the scaling, from either place where files may have them."""
    values: dict[str, Any] = {}
    inner = fields.get("rope_parameters") or {}
    separate = "rope_local_base_freq" in family.reads
    if inner and separate != bool(set(_KINDS) & set(inner)):
        shape = "separate groups for full_attention and sliding_attention" if separate else "one group for all layers"
        problems.append(f"rope_parameters = {inner} is not implemented for {family.name} (only {shape})")
        return values
    if separate:
        inner, local = (inner.get(kind) or {} for kind in _KINDS)
        values["local_rope_theta"] = _theta("rope_local_base_freq", fields, local, family, problems)
        if _scaling("rope_parameters.sliding_attention", local, problems) is not None:
            problems.append("rope_parameters.sliding_attention.rope_type: only 'default' is implemented")
    values["rope_theta"] = _theta("rope_theta", fields, inner, family, problems)
    groups = {"rope_scaling": fields.get("rope_scaling"), "rope_parameters": inner}
    scalings = {name: _scaling(name, group, problems) for name, group in groups.items() if group}
    if len(set(scalings.values())) > 1 and not problems:
        problems.append(f"rope_scaling = {scalings['rope_scaling']} contradicts rope_parameters: remove one of them")
    return values | {"rope_scaling": next(iter(scalings.values()), None)}


def _theta(key: str, fields: Fields, inner: Fields, family: Family, problems: list[str]) -> float:
    """The base of the frequencies: in `inner`, or outside of it under `key`, or absent."""
    outer = fields.get(key)
    theta = inner.get("rope_theta", outer)
    if outer is not None and theta != outer:
        problems.append(f"{key} = {outer} contradicts rope_parameters.rope_theta = {theta}: remove one of them")
    theta = family.missing.get(key, 1e4) if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        problems.append(f"{key} = {theta!r} is not a number")
        return 1e4
    return float(theta)


def _scaling(name: str, group: Any, problems: list[str]) -> RopeScaling | None:
    if not isinstance(group, Mapping):
        problems.append(f"{name} = {group!r} is not a group of fields")
        return None
    kind = str(group.get("rope_type", group.get("type", "(missing)" if name == "rope_scaling" else "default")))
    if kind not in _SCALINGS:
        problems.append(f"{name}.rope_type: " + unknown("scaling", kind, _SCALINGS))
        return None
    names, neutral = _SCALINGS[kind], {"partial_rotary_factor": 1.0, "attention_factor": None}
    for key, value in group.items():
        if key not in ("rope_type", "type", "rope_theta", *names) and neutral.get(key, ...) != value:
            problems.append(f"{name}.{key} = {value!r} is not implemented for rope_type {kind!r}")
    wrong = [key for key in names if not isinstance(group.get(key), int | float)]
    problems += [f"{name}.{key} = {group.get(key)!r} must be a number" for key in wrong]
    return None if wrong or not names else RopeScaling(kind, *(group[key] for key in names))
