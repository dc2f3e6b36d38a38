"""Measurements of runs, and the export of their weights."""

from es_jax.core.extras import require

require("llm")
