"""The shapes of well-known models, as their published config.json files give them, for planning without the hub.

Loading never uses them. Sources: config.json of the repositories of those names on huggingface.co.
"""

from typing import Any

from es_jax.models.config import RopeScaling, TransformerConfig

_QWEN = {"family": "qwen2", "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True, "max_positions": 32768}
_LLAMA = {"family": "llama", "rope_theta": 5e5, "norm_eps": 1e-5, "max_positions": 131072}
_LLAMA_31 = {**_LLAMA, "rope_scaling": RopeScaling("llama3", 8.0)}
_LLAMA_32 = {**_LLAMA, "rope_scaling": RopeScaling("llama3", 32.0)}
_COLUMNS = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "tied_embeddings")
_ROWS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "Qwen/Qwen2.5-0.5B": (_QWEN, (151936, 896, 24, 14, 2, 64, 4864, True)),
    "Qwen/Qwen2.5-1.5B": (_QWEN, (151936, 1536, 28, 12, 2, 128, 8960, True)),
    "Qwen/Qwen2.5-3B": (_QWEN, (151936, 2048, 36, 16, 2, 128, 11008, True)),
    "Qwen/Qwen2.5-7B": (_QWEN, (152064, 3584, 28, 28, 4, 128, 18944, False)),
    "meta-llama/Llama-3.2-1B": (_LLAMA_32, (128256, 2048, 16, 32, 8, 64, 8192, True)),
    "meta-llama/Llama-3.2-3B": (_LLAMA_32, (128256, 3072, 28, 24, 8, 128, 8192, True)),
    "meta-llama/Llama-3.1-8B": (_LLAMA_31, (128256, 4096, 32, 32, 8, 128, 14336, False)),
}
PUBLISHED = {
    name: TransformerConfig(**family, **dict(zip(_COLUMNS, row, strict=True))) for name, (family, row) in _ROWS.items()
}


def published(name: str) -> TransformerConfig | None:
    """The shape of a hub name, with or without "-Instruct"; None for one that is not in the table."""
    return PUBLISHED.get(name.removesuffix("-Instruct"))
