"""Predicts the distance ‖θ − θ₀‖ of a run from the members' weights zₙ in its seed log."""

import math

import numpy as np

from es_jax.es import theory
from es_jax.rundir.seed_log import Entry
from es_jax.training.config import RunConfig

STRONG = 0.1  # ratio of the l1 pull to a weight's step above which the continuous form is more than 2 % off


class PredictedDrift:
    """‖θ_t − θ₀‖ of this run in exact arithmetic, updated with each entry of its seed log.

    A step moves every weight by a normal number of variance α² Σ wₙ²/N². From there the second moments of the weights x
    and of the anchor a, both relative to θ₀, follow exactly for no anchor and for l2: x ← q(x + u) + (1 − q)a with
    q = 1 − αλ, a ← βa + (1 − β)x with β = 1 for an anchor that stays. For l1 it is the closed form of
    `theory.anchored_norm` with the run's mean step. `dim`: how many weights; `offset`: ‖a₀ − θ₀‖.
    """

    def __init__(self, config: RunConfig, dim: int, *, offset: float = 0.0):
        self._config, self._dim, self._offset = config, dim, offset
        self._means, self._moments = np.array([0.0, 1.0]), np.zeros((2, 2))  # of (x, a): in units of offset, around it
        self._walked, self._steps = 0.0, 0  # E‖Σ u‖²

    def add(self, entry: Entry) -> None:
        if not self._config.record.perturbs:
            return
        rates, anchor = self._config.logged_rates(entry), self._config.optim.anchor
        variance = theory.step_variance(np.array(entry.weights), paired=entry.paired)
        step = rates.learning_rate**2 * self._dim * variance
        q = 1 - rates.learning_rate * rates.strength if anchor.penalty == "l2" else 1.0
        beta = 1.0 if anchor.ema_decay is None else anchor.ema_decay
        self._steps, self._walked = self._steps + 1, self._walked + step
        linear = np.array([[1, 0], [1 - beta, beta]]) @ np.array([[q, 1 - q], [0, 1]])
        self._moments[0, 0] += step
        self._means, self._moments = linear @ self._means, linear @ self._moments @ linear.T

    @property
    def norm(self) -> float | None:
        """The prediction; None if there is no closed form: for other methods and optimizers, and for an l1 anchor that
        is elsewhere, moves, has a schedule, or pulls hard relative to the step."""
        config, optim, anchor = self._config, self._config.optim, self._config.optim.anchor
        if not config.record.perturbs or optim.name != "sgd":
            return None
        if anchor.penalty != "l1":
            return math.sqrt(self._moments[0, 0] + (self._means[0] * self._offset) ** 2)
        moving = anchor.ema_decay is not None or anchor.source or self._offset
        if moving or not anchor.schedule == optim.schedule == "constant":
            return None
        mean = self._walked / (optim.learning_rate**2 * self._dim * max(self._steps, 1))  # variance of a step: 1/N
        if not mean:
            return 0.0
        if config.anchor_strength > STRONG * math.sqrt(mean):
            return None
        scale = math.sqrt(mean * config.es.population)
        return theory.anchored_norm(
            learning_rate=optim.learning_rate * scale,
            dim=self._dim,
            steps=self._steps,
            population=config.es.population,
            strength=config.anchor_strength / scale,
            penalty="l1",
        )
