"""Where the time of a step goes."""

from es_jax.core.extras import require

require("llm")
