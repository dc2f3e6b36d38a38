"""A run: config, state, methods and the loop."""

from es_jax.core.extras import require

require("llm")
