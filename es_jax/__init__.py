"""Fine-tune LLMs with Evolution Strategies in JAX, and keep what they knew with Anchored Weight Decay.

The public names, by what they are for:

    es           Population, Members, GaussianNoise, SharedSeedNoise, z_score, centered_rank, theory
    optim        anchored_weight_decay, build_optimizer
    models       TransformerConfig, RopeScaling, Transformer
    weights      load_model, save_model, Model, verify_model, VerificationReport, VerificationError
    generation   Greedy, Temperature, TopK, TopP, Engine, Generation, score_tokens
    text         complete, perplexity
    tasks        Example, Score, SimpleTask, Task, get_task
    runs         run, replay, RunResult, StepRecord, evaluate_run, load_step
    grpo         group_relative

They are imported when they are first used: `import es_jax` starts neither JAX nor transformers.
"""

import importlib
from typing import Any

_HOME = {
    "es_jax.es.population": ("Members", "Population"),
    "es_jax.es.noise": ("GaussianNoise", "SharedSeedNoise"),
    "es_jax.es.shaping": ("centered_rank", "z_score"),
    "es_jax.optim.anchored": ("anchored_weight_decay",),
    "es_jax.optim.chains": ("build_optimizer",),
    "es_jax.models.config": ("RopeScaling", "TransformerConfig"),
    "es_jax.models.transformer": ("Transformer",),
    "es_jax.weights.model": ("Model", "load_model", "save_model"),
    "es_jax.weights.verify": ("VerificationReport", "VerificationError", "verify_model"),
    "es_jax.generate.sampling": ("Greedy", "Temperature", "TopK", "TopP"),
    "es_jax.generate.engine": ("Engine", "Generation"),
    "es_jax.generate.score": ("score_tokens",),
    "es_jax.scoring.text": ("complete", "perplexity"),
    "es_jax.tasks.task": ("Example", "Score", "Task"),
    "es_jax.tasks": ("SimpleTask", "get_task"),
    "es_jax.training.loop": ("RunResult", "run"),
    "es_jax.training.recorder": ("StepRecord",),
    "es_jax.training.grpo": ("group_relative",),
    "es_jax.training.weights_at": ("replay",),
    "es_jax.evals.load_step": ("load_step",),
    "es_jax.evals.runner": ("evaluate_run",),
}
_NAMES = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_NAMES, "theory"])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "theory":
        return importlib.import_module("es_jax.es.theory")
    if name not in _NAMES:
        raise AttributeError(f"module 'es_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
