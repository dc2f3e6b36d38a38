"""From completions to rewards and accuracies."""

from es_jax.core.extras import require

require("llm")
