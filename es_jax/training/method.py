"""What a way of training adds to the loop, and Evolution Strategies as one.

The loop owns tasks, prompts, grading, records, checkpoints and evaluation. A method makes a step's completions and
moves the weights by them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from es_jax.core import rng
from es_jax.es.population import Members, Population
from es_jax.es.shaping import SHAPINGS
from es_jax.training.config import RunConfig
from es_jax.training.es_step import Evaluator
from es_jax.training.grading import Graded, Grader
from es_jax.training.seedlog import Entry
from es_jax.training.state import State


class Method(Protocol):
    """One way of training; made from a run's config, its evaluator and its state.

    Attributes:
      replayable: whether a line of the seed log rebuilds its step. Where it does not, a run goes on from its last
        checkpoint and makes the steps behind it again.
      unit: what a step is counted in on the screen, and how many a step has.
    """

    replayable: bool
    unit: tuple[str, int]

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

    def learn(self, entry: Entry) -> dict[str, float]:
        """Move the weights by what was collected; what else there is to record of it."""


class Evolution:
    """Members → rewards → weights → estimate and update (arXiv 2509.24372)."""

    replayable = True

    def __init__(self, config: RunConfig, evaluator: Evaluator, state: State):
        self._config, self._evaluator, self._state = config, evaluator, state
        self._population = Population(config.es.population, seed=config.train.seed, antithetic=config.es.antithetic)
        self.unit = ("member", config.es.population)

    def collect(
        self, step: int, prompts: Sequence[Sequence[int]], grade: Grader, done: Callable[[int], None]
    ) -> tuple[Entry, list[list[Graded]]]:
        """Every member's completions, in the order of the prompts."""
        es, members = self._config.es, self._population.members(step)
        own = self._evaluate(members, prompts, grade, done)
        graded = list(grade.shared({i: (range(len(prompts)), mine) for i, mine in enumerate(own) if mine}).values())
        done(own.count([]))  # by other processes
        rewards = np.array([np.mean([g.score.reward for g in mine]) for mine in graded])
        if es.rewards == "random":
            rewards = rng.random_rewards(self._config.train.seed, step, len(members))
        weights = SHAPINGS[es.shaping](rewards, nan_rewards=es.nan_rewards)
        return Entry.of(step, members, rewards=rewards, weights=weights), graded

    def learn(self, entry: Entry) -> dict[str, float]:
        """The step of `State.apply`, as in a replay."""
        self._state.apply(entry)
        return {}

    def _evaluate(
        self, members: Members, prompts: Sequence[Sequence[int]], grade: Grader, done: Callable[[int], None]
    ) -> list[list[Graded]]:
        slots, batches = self._evaluator.engine.slots, self._evaluator.engine.batches(prompts)
        graded: list[list[Graded]] = [[] for _ in range(len(members))]
        for member, batch, tokens, length in self._evaluator.members(self._state.params, members, batches):
            first = batch * slots
            graded[member] += grade(range(first, min(first + slots, len(prompts))), tokens, length)
            if len(graded[member]) == len(prompts):
                done(1)
        return graded
