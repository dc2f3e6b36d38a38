"""The interface of a training method, and the table of all methods.

A method makes a step's completions and moves the weights by their rewards. The loop does everything else.
"""

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Graded, Grader

TokenLists = Sequence[Sequence[int]]
Progress = Callable[[int], None]  # called with the number of newly finished units of a step
StepResult = tuple[Entry, list[list[Graded]], Mapping[str, float | None]]


@runtime_checkable
class Method(Protocol):
    """A training method; made from a run's config, evaluator, state, packing of prompts and random streams.

    Attributes:
      unit: the unit in which the screen counts a step, and how many a step has.
      models: how many different weights decode in a step.
    """

    unit: tuple[str, int]
    models: int

    def step(self, step: int, prompts: TokenLists, grade: Grader, done: Progress) -> StepResult:
        """Make the completions of step 1, 2, … and move the weights by their rewards.

        Returns:
          The step's line of the seed log; a list of completions for each member or rollout; further metrics of the
            step.
        """

    def seconds_alone(self, entry: Entry) -> Mapping[str, float]:
        """Seconds of parts that a trace cannot separate from the rest of their program; all processes call it."""


@dataclasses.dataclass(frozen=True)
class MethodRecord:
    """What differs between methods outside of their step. The config group with the method's name holds its fields.

    Attributes:
      title, tag, size: texts about the method and a step for the card of an exported model; size contains the config's
        fields.
      implementation, programs: the names of the `Method` and of the class by which `es_jax.planning` compiles it; both
        are imported when used.
      replayable: whether a line of the seed log rebuilds its step. If not, a resumed run starts from its last
        checkpoint and makes the steps after it again.
      perturbs: whether members are the weights plus σ times noise. If so, a step has a σ, and theory predicts the
        drift.
    """

    title: str
    tag: str
    size: str
    implementation: str
    programs: str
    replayable: bool
    perturbs: bool

    def make(self, *arguments: Any) -> Method:
        return pkgutil.resolve_name(self.implementation)(*arguments)


METHODS = {
    "es": MethodRecord(
        title="Evolution Strategies",
        tag="evolution-strategies",
        size="ES with N = {config.es.population}",
        implementation="es_jax.training.es:Evolution",
        programs="es_jax.planning.programs:Programs",
        replayable=True,
        perturbs=True,
    ),
    "grpo": MethodRecord(
        title="GRPO",
        tag="grpo",
        size="GRPO with {config.grpo.rollouts} rollouts a prompt",
        implementation="es_jax.training.grpo:GRPO",
        programs="es_jax.planning.grpo_programs:PolicyPrograms",
        replayable=False,
        perturbs=False,
    ),
}
