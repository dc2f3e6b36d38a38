"""Model files: safetensors, GGUF and tokenizers, read, written and verified."""

from es_jax.core.extras import require

require("llm")
