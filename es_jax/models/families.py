"""The differences between model families: flags, fields of config.json, names of weights in files. One record for each
family."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from es_jax.core.names import unknown
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import param_shapes


class Weight(NamedTuple):
    """Where one parameter is: its path in the tree, and its key in Hugging Face and GGUF files ({} is the layer)."""

    path: str
    hf: str
    gguf: str
    rotary: str = ""  # config field with the number of heads, for rows that rotary positions rotate

    @property
    def transpose(self) -> bool:
        """Whether files hold [out, in], where the tree holds [in, out]."""
        return self.path.endswith("kernel")


def _weights(table: str) -> tuple[Weight, ...]:
    return tuple(Weight(*row.split()) for row in table.strip().splitlines())


# The names in most families; a family's `names` replaces some.
WEIGHTS = _weights("""
    embed/embedding           model.embed_tokens.weight                        token_embd.weight
    layers/attn_norm/scale    model.layers.{}.input_layernorm.weight           blk.{}.attn_norm.weight
    layers/attn/q/kernel      model.layers.{}.self_attn.q_proj.weight          blk.{}.attn_q.weight       heads
    layers/attn/q/bias        model.layers.{}.self_attn.q_proj.bias            blk.{}.attn_q.bias         heads
    layers/attn/q_norm/scale  model.layers.{}.self_attn.q_norm.weight          blk.{}.attn_q_norm.weight
    layers/attn/k/kernel      model.layers.{}.self_attn.k_proj.weight          blk.{}.attn_k.weight       kv_heads
    layers/attn/k/bias        model.layers.{}.self_attn.k_proj.bias            blk.{}.attn_k.bias         kv_heads
    layers/attn/k_norm/scale  model.layers.{}.self_attn.k_norm.weight          blk.{}.attn_k_norm.weight
    layers/attn/v/kernel      model.layers.{}.self_attn.v_proj.weight          blk.{}.attn_v.weight
    layers/attn/v/bias        model.layers.{}.self_attn.v_proj.bias            blk.{}.attn_v.bias
    layers/attn/o/kernel      model.layers.{}.self_attn.o_proj.weight          blk.{}.attn_output.weight
    layers/mlp_norm/scale     model.layers.{}.post_attention_layernorm.weight  blk.{}.ffn_norm.weight
    layers/mlp/gate/kernel    model.layers.{}.mlp.gate_proj.weight             blk.{}.ffn_gate.weight
    layers/mlp/up/kernel      model.layers.{}.mlp.up_proj.weight               blk.{}.ffn_up.weight
    layers/mlp/down/kernel    model.layers.{}.mlp.down_proj.weight             blk.{}.ffn_down.weight
    final_norm/scale          model.norm.weight                                output_norm.weight
    head/kernel               lm_head.weight                                   output.weight
""")
_POST_NORMS = _weights("""
    layers/attn_post_norm/scale  model.layers.{}.post_attention_layernorm.weight    blk.{}.post_attention_norm.weight
    layers/mlp_norm/scale        model.layers.{}.pre_feedforward_layernorm.weight   blk.{}.ffn_norm.weight
    layers/mlp_post_norm/scale   model.layers.{}.post_feedforward_layernorm.weight  blk.{}.post_ffw_norm.weight
""")


_NONE: Mapping[str, Any] = MappingProxyType({})


class Family(NamedTuple):
    """One family of checkpoints.

    `flags` are TransformerConfig fields that all its models share; `reads` are the fields that config.json sets besides
    the sizes. `missing` holds the format's values for absent fields, and `fixed` the only values that are implemented.
    `windows` says which layers are local where config.json has no layer_types: "none", "all", "late" (with
    use_sliding_window, from max_window_layers on), or "alternating" (all but every sliding_window_pattern-th).
    """

    name: str  # model_type in config.json
    architecture: str
    gguf_architecture: str
    flags: Mapping[str, Any] = _NONE
    reads: Mapping[str, str] = _NONE
    missing: Mapping[str, Any] = _NONE
    fixed: Mapping[str, Any] = _NONE
    windows: str = "none"
    names: tuple[Weight, ...] = ()  # rows that replace rows of WEIGHTS with the same path
    gguf_permuted: bool = False  # GGUF files interleave the rows of q and k within each head


_FIXED: dict[str, Any] = {
    "attention_bias": False, "quantization_config": None, "auto_map": None, "partial_rotary_factor": 1.0,
    "rope_interleaved": False, "logits_soft_cap": None, "use_mrope": False, "is_encoder_decoder": False,
}  # fmt: skip
_SILU = {**_FIXED, "hidden_act": "silu", "mlp_bias": False}
_GELU = {
    **_FIXED, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
    "use_bidirectional_attention": False,
}  # fmt: skip
_GEMMA_FLAGS = {"post_norms": True, "norm_plus_one": True, "activation": "gelu_tanh", "scale_embeddings": True}
_GEMMA_READS = {"query_pre_attn_scalar": "query_pre_attn_scalar", "final_logit_softcapping": "final_softcap"}
_GEMMA_MISSING = {
    "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 2, "rope_theta": 1e4,
}  # fmt: skip
_QWEN_MISSING = {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32}

_FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", fixed={**_SILU, "sliding_window": None}, gguf_permuted=True),
    Family(
        "mistral", "MistralForCausalLM", "llama",
        missing={"sliding_window": 4096, "num_key_value_heads": 8}, fixed=_SILU, windows="all", gguf_permuted=True,
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", "qwen2",
        flags={"qkv_bias": True}, missing=_QWEN_MISSING, fixed=_SILU, windows="late",
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", "qwen3",
        flags={"qk_norm": True}, missing={**_QWEN_MISSING, "head_dim": 128}, fixed=_SILU, windows="late",
    ),
    Family(
        "gemma2", "Gemma2ForCausalLM", "gemma2",
        flags=_GEMMA_FLAGS,
        reads={**_GEMMA_READS, "attn_logit_softcapping": "attn_softcap"},
        missing={**_GEMMA_MISSING, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        fixed=_GELU, windows="alternating", names=_POST_NORMS,
    ),
    Family(
        "gemma3_text", "Gemma3ForCausalLM", "gemma3",
        flags={**_GEMMA_FLAGS, "qk_norm": True},
        reads={**_GEMMA_READS, "rope_local_base_freq": "local_rope_theta"},
        missing={**_GEMMA_MISSING, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        fixed={**_GELU, "attn_logit_softcapping": None}, windows="alternating", names=_POST_NORMS,
    ),
    Family(
        "smollm3", "SmolLM3ForCausalLM", "smollm3",
        reads={"no_rope_layers": "rope_layers"},
        missing={
            "tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 2e6, "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        fixed={**_SILU, "use_sliding_window": False}, gguf_permuted=True,
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in _FAMILIES}


def weights_of(config: TransformerConfig) -> tuple[Weight, ...]:
    """A `Weight` for every parameter of this config, with its family's names."""
    weights = {weight.path: weight for weight in (*WEIGHTS, *FAMILIES[config.family].names)}
    return tuple(weights[path] for path in param_shapes(config))


def find_family(name: str, *, by: str = "name") -> Family:
    """The first family whose field `by` (name, architecture, gguf_architecture) is `name`.

    Raises ValueError that suggests the nearest known names.
    """
    known = {getattr(family, by): family for family in reversed(FAMILIES.values())}
    if name not in known:
        kind = {"name": "model_type", "gguf_architecture": "general.architecture"}.get(by, by)
        raise ValueError(unknown(kind, name, known))
    return known[name]
