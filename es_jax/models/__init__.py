"""Transformers of several families in Flax, with a cache for decoding."""

from es_jax.core.extras import require

require("llm")
