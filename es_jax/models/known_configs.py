"""The shapes of well-known models, as their published config.json files give them, for planning without the hub.

Loading never uses this table: weights come with their own config. Sources: config.json of the repositories of those
names on huggingface.co; the instruction-tuned model of each size has the shape of the base model.
"""

from es_jax.models.config import RopeScaling, TransformerConfig


def _qwen(vocab_size: int, width: int, layers: int, heads: int, kv_heads: int, mlp_dim: int, tied: bool):
    return TransformerConfig(
        family="qwen2", vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=width // heads, mlp_dim=mlp_dim, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, tied_embeddings=tied,
        max_positions=32768,
    )  # fmt: skip


def _llama(width: int, layers: int, heads: int, mlp_dim: int, tied: bool, factor: float):
    return TransformerConfig(
        family="llama", vocab_size=128256, width=width, layers=layers, heads=heads, kv_heads=8, head_dim=width // heads,
        mlp_dim=mlp_dim, rope_theta=5e5, norm_eps=1e-5, tied_embeddings=tied, max_positions=131072,
        rope_scaling=RopeScaling("llama3", factor),
    )  # fmt: skip


PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": _qwen(151936, 896, 24, 14, 2, 4864, True),
    "Qwen/Qwen2.5-1.5B": _qwen(151936, 1536, 28, 12, 2, 8960, True),
    "Qwen/Qwen2.5-3B": _qwen(151936, 2048, 36, 16, 2, 11008, True),
    "Qwen/Qwen2.5-7B": _qwen(152064, 3584, 28, 28, 4, 18944, False),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 8192, True, 32.0),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 8192, True, 32.0),
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 14336, False, 8.0),
}


def published(name: str) -> TransformerConfig | None:
    """The shape of a hub name, with or without "-Instruct"; None for one that is not in the table.

    >>> published("Qwen/Qwen2.5-7B-Instruct").layers
    28
    """
    return PUBLISHED.get(name.removesuffix("-Instruct"))
