"""Whether a run fits devices that are not here, and how fast it could be."""

from es_jax.core.extras import require

require("llm")
