"""What a way of training adds to the loop, and Evolution Strategies as one.

The loop owns tasks, prompts, grading, records, checkpoints and evaluation. A method makes a step's completions and
moves the weights by them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from es_jax.core import rng
from es_jax.es.population import Members, Population
from es_jax.es.shaping import SHAPINGS
from es_jax.generate.prompts import Packing
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Graded, Grader
from es_jax.training.config import RunConfig
from es_jax.training.diagnostics import diagnose
from es_jax.training.es_step import Evaluator
from es_jax.training.state import State


class Method(Protocol):
    """One way of training; made from a run's config, its evaluator, its state and the packing of its prompts.

    Attributes:
      replayable: whether a line of the seed log rebuilds its step. Where it does not, a run goes on from its last
        checkpoint and makes the steps behind it again.
      unit: what a step is counted in on the screen, and how many a step has.
      models: how many different weights decode in a step.
    """

    replayable: bool
    unit: tuple[str, int]
    models: int

    def collect(
        self, step: int, prompts: Sequence[Sequence[int]], grade: Grader, done: Callable[[int], None]
    ) -> tuple[Entry, list[list[Graded]]]:
        """A step's completions, graded: its line of the seed log, and a list for each member or rollout.

        Args:
          step: 1, 2, …
          prompts: token ids of the step's prompts.
          grade: scores of completions, from their prompts' indices, tokens [B, L] and lengths [B].
          done: told how many more units there are.
        """

    def learn(self, entry: Entry) -> Mapping[str, float | None]:
        """Move the weights by what was collected; what else there is to record of it."""

    def inside(self, entry: Entry) -> Mapping[str, float]:
        """Seconds, measured alone, of what is part of a program that a trace shows as one; all processes call it."""


class Evolution:
    """Members → rewards → weights → estimate and update (arXiv 2509.24372)."""

    replayable = True

    def __init__(self, config: RunConfig, evaluator: Evaluator, state: State, packing: Packing):
        self._config, self._evaluator, self._state, self._packing = config, evaluator, state, packing
        self._population = Population(config.es.population, seed=config.train.seed, antithetic=config.es.antithetic)
        self.unit, self.models = ("member", config.es.population), config.es.population
        self._gap: float | None = None

    def collect(
        self, step: int, prompts: Sequence[Sequence[int]], grade: Grader, done: Callable[[int], None]
    ) -> tuple[Entry, list[list[Graded]]]:
        """Every member's completions, in the order of the prompts."""
        es, members = self._config.es, self._population.members(step)
        scaled = dataclasses.replace(members, sign=members.sign * np.float32(self._config.rates(step).sigma / es.sigma))
        graded = self._graded(scaled, prompts, grade, done)
        rewards = np.array([np.mean([g.score.reward for g in mine]) for mine in graded])
        self._measure_gap(step, prompts, grade, rewards)
        if es.rewards == "random":
            rewards = rng.random_rewards(self._config.train.seed, step, len(members))
        weights = SHAPINGS[es.shaping](rewards, nan_rewards=es.nan_rewards)
        rates = self._config.rates(step)
        return Entry.of(step, members, rewards=rewards, weights=weights, rates=rates), graded

    def learn(self, entry: Entry) -> dict[str, float | None]:
        """The step of `State.apply`, as in a replay; and what docs/diagnostics.md explains."""
        self._state.apply(entry)
        rates = self._config.logged_rates(entry)
        found = diagnose(entry, learning_rate=rates.learning_rate, sigma=rates.sigma)
        if self._config.optim.name != "sgd" or self._config.es.rewards == "random":
            found["expected_gain"] = None
        return {**found, "curvature_gap": self._gap, **rates._asdict()}

    def inside(self, entry: Entry) -> dict[str, float]:
        """The estimate, which XLA fuses with the optimizer."""
        return {"estimate": self._state.estimate_seconds(entry)}

    def _measure_gap(self, step: int, prompts: Sequence[Sequence[int]], grade: Grader, rewards: np.ndarray) -> None:
        """Mean reward of the members minus that of the model between them, at the steps behind an evaluation."""
        every, self._gap = self._config.evals.every, None
        if every and (step - 1) % every == 0 and self._config.es.rewards == "task":
            nobody = Members(jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.float32))
            (centre,) = self._graded(nobody, prompts, grade, lambda n: None)
            self._gap = float(rewards.mean() - np.mean([g.score.reward for g in centre]))

    def _graded(
        self, members: Members, prompts: Sequence[Sequence[int]], grade: Grader, done: Callable[[int], None]
    ) -> list[list[Graded]]:
        """All members' completions, whichever process decoded them."""
        rows, own = self._packing.pack(prompts, rows=len(prompts)), {}
        for member, tokens, length in self._evaluator.members(self._state.params, members, rows):
            own[member] = range(len(prompts)), grade(range(len(prompts)), tokens, length)
            done(1)
        graded = list(grade.shared(own).values())
        done(len(members) - len(own))  # by other processes
        return graded
