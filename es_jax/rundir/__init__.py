"""The directory of a run: seed log, checkpoints, metrics."""

from es_jax.core.extras import require

require("llm")
