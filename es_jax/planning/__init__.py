"""Plans: whether a run fits on devices that you do not have, and how fast it could be."""

from es_jax.core.extras import require

require("llm")
