"""Prompts in, tokens out: batched decoding, and scoring of given tokens."""

from es_jax.core.extras import require

require("llm")
