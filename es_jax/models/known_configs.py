"""The shapes of well-known models, from their published config.json files, for planning without the hub.

Loading never uses them. Sources: config.json in the repositories of those names on huggingface.co.
"""

from typing import Any

from es_jax.models.config import RopeScaling, TransformerConfig

_FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2.5": {"family": "qwen2", "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True, "max_positions": 32768},
    "SmolLM2": {"family": "llama", "rope_theta": 1e5, "max_positions": 8192},
    "Llama-3.1": {
        "family": "llama",
        "rope_theta": 5e5,
        "max_positions": 131072,
        "rope_scaling": RopeScaling("llama3", 8.0),
    },
    "Llama-3.2": {
        "family": "llama",
        "rope_theta": 5e5,
        "max_positions": 131072,
        "rope_scaling": RopeScaling("llama3", 32.0),
    },
}
_SIZES = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim")
_ROWS = """
    Qwen/Qwen2.5-0.5B        Qwen2.5    tied    151936   896  24  14  2   64   4864
    Qwen/Qwen2.5-1.5B        Qwen2.5    tied    151936  1536  28  12  2  128   8960
    Qwen/Qwen2.5-3B          Qwen2.5    tied    151936  2048  36  16  2  128  11008
    Qwen/Qwen2.5-7B          Qwen2.5    untied  152064  3584  28  28  4  128  18944
    HuggingFaceTB/SmolLM2-135M  SmolLM2 tied    49152    576  30   9  3   64   1536
    meta-llama/Llama-3.2-1B  Llama-3.2  tied    128256  2048  16  32  8   64   8192
    meta-llama/Llama-3.2-3B  Llama-3.2  tied    128256  3072  28  24  8  128   8192
    meta-llama/Llama-3.1-8B  Llama-3.1  untied  128256  4096  32  32  8  128  14336
"""
PUBLISHED = {
    name: TransformerConfig(**_FAMILIES[family] | dict(zip(_SIZES, map(int, sizes), strict=True)),
                            tied_embeddings=tied == "tied")
    for name, family, tied, *sizes in map(str.split, _ROWS.strip().splitlines())
}  # fmt: skip


def published(name: str) -> TransformerConfig | None:
    """The shape of the model with that hub name, with or without "-Instruct"; None if it is not in the table."""
    return PUBLISHED.get(name.removesuffix("-Instruct"))
