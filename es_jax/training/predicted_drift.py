"""The distance from the base weights that theory predicts for a run, from the weights its members had."""

import math

import numpy as np

from es_jax.es import theory
from es_jax.rundir.seed_log import Entry
from es_jax.training.config import RunConfig
from es_jax.training.method import METHODS

STRONG = 0.1  # l1 pull over the step of a weight, above which the continuous form is more than 2 % off


class PredictedDrift:
    """‖θ_t − θ₀‖ of this very run in exact arithmetic, carried on by the entries of its seed log.

    A step moves every weight by a normal number of variance α² Σ wₙ²/N². From there the second moments of the weights x
    and of the anchor a, both relative to θ₀, follow exactly for no anchor and for l2: x ← q(x + u) + (1 − q)a with
    q = 1 − αλ, a ← βa + (1 − β)x with β = 1 for an anchor that stays. For l1 it is the closed form of
    `theory.anchored_norm` with the run's mean step. `dim`: how many weights; `offset`: ‖a₀ − θ₀‖.
    """

    def __init__(self, config: RunConfig, dim: int, *, offset: float = 0.0):
        self._config, self._dim, self._offset = config, dim, offset
        self._xx = self._xa = self._aa = self._walked = 0.0  # E‖x‖², E⟨x, a⟩, E‖a‖² around their means; E‖Σ u‖²
        self._towards, self._anchored, self._steps = 0.0, 1.0, 0  # means of x and a, in units of the offset

    def add(self, entry: Entry) -> None:
        if not METHODS[self._config.method].perturbs:
            return
        rates, anchor = self._config.logged_rates(entry), self._config.optim.anchor
        variance = theory.step_variance(np.array(entry.weights), paired=entry.paired)
        step = rates.learning_rate**2 * self._dim * variance
        q = 1 - rates.learning_rate * rates.strength if anchor.penalty == "l2" else 1.0
        beta = 1.0 if anchor.ema_decay is None else anchor.ema_decay
        self._steps, self._walked = self._steps + 1, self._walked + step
        xx = q**2 * (self._xx + step) + 2 * q * (1 - q) * self._xa + (1 - q) ** 2 * self._aa
        xa = q * self._xa + (1 - q) * self._aa
        self._aa = beta**2 * self._aa + 2 * beta * (1 - beta) * xa + (1 - beta) ** 2 * xx
        self._xx, self._xa = xx, beta * xa + (1 - beta) * xx
        self._towards = q * self._towards + (1 - q) * self._anchored
        self._anchored = beta * self._anchored + (1 - beta) * self._towards

    @property
    def norm(self) -> float | None:
        """The prediction; None where there is no closed form: for other methods and optimizers, and for an l1 anchor
        that is elsewhere, or moves, or has a schedule, or pulls hard beside the step."""
        config, optim, anchor = self._config, self._config.optim, self._config.optim.anchor
        if not METHODS[config.method].perturbs or optim.name != "sgd":
            return None
        if anchor.penalty != "l1":
            return math.sqrt(self._xx + (self._towards * self._offset) ** 2)
        moving = anchor.ema_decay is not None or anchor.source or self._offset
        if moving or not anchor.schedule == optim.schedule == "constant":
            return None
        mean = self._walked / (optim.learning_rate**2 * self._dim * max(self._steps, 1))  # of a step: 1/N
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
