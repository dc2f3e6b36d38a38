"""The distance from the base weights that theory predicts for a run, from the weights its members had."""

import math

import numpy as np

from es_jax.es import theory
from es_jax.training.config import RunConfig
from es_jax.training.seedlog import Entry


class Walk:
    """‖θ_t − θ₀‖ of this very run in exact arithmetic, carried on by the entries of its seed log.

    Exact in expectation for the plain and the l2 walk; for l1 the closed form of `theory.anchored_norm`, with the mean
    step of the run.

    Args:
      config: the run's.
      dim: d, how many weights; a tied embedding counts once.
    """

    def __init__(self, config: RunConfig, dim: int):
        self._config, self._dim = config, dim
        self._square, self._steps = 0.0, 0

    def add(self, entry: Entry) -> None:
        """One more step."""
        if self._config.method != "es":
            return
        rate, strength = self._config.optim.learning_rate, self._config.anchor_strength
        self._steps += 1
        self._square += rate**2 * self._dim * theory.step_variance(np.array(entry.weights), paired=entry.paired)
        if self._config.optim.anchor.penalty == "l2":
            self._square *= (1 - rate * strength) ** 2

    @property
    def norm(self) -> float | None:
        """The prediction; None for methods and optimizers whose walk has no closed form."""
        config = self._config
        if config.method != "es" or config.optim.name != "sgd":
            return None
        if config.optim.anchor.penalty != "l1" or not self._steps:
            return math.sqrt(self._square)
        mean = self._square / (config.optim.learning_rate**2 * self._dim * self._steps)  # variance of a step: 1/N
        return theory.anchored_norm(
            learning_rate=config.optim.learning_rate * math.sqrt(mean * config.es.population),
            dim=self._dim,
            steps=self._steps,
            population=config.es.population,
            strength=config.anchor_strength / math.sqrt(mean * config.es.population) if mean else 0.0,
            penalty="l1",
        )
