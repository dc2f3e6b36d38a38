"""Prompts in, tokens out: batched decoding and the scoring of given tokens."""

from es_jax.core.extras import require

require("llm")
