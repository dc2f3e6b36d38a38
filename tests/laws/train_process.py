"""One process of a run of several, for tests: `python -m es_jax.train`, whose grading fails at $FAIL_AT if that is set.

$FAIL_AT is "RANK STEP": process RANK cannot grade its completions of that step. With $WORKERS the trained
task, one of the laboratory's, has so many processes that score.
"""

import dataclasses
import os

import jax

from es_jax import train
from es_jax.scoring.grading import Grader
from es_jax.tasks.lab import Lab
from es_jax.training import loop
from es_jax.training.loop import _Run


@dataclasses.dataclass(frozen=True)
class LabWithWorkers(Lab):
    workers: int = 0


def main() -> None:
    """The command, with a fault where one is asked for."""
    rank, step = map(int, os.environ.get("FAIL_AT", "-1 -1").split())
    if workers := int(os.environ.get("WORKERS", 0)):
        loop.make_task = lambda config: LabWithWorkers(config.task.name.removeprefix("lab-"), workers=workers)
    now, original, grade = [0], _Run._step, Grader.__call__

    def stepping(self, step):
        now[0] = step
        return original(self, step)

    def grading(self, *args):
        if (jax.process_index(), now[0]) == (rank, step):
            raise ValueError("the grader broke")
        return grade(self, *args)

    _Run._step, Grader.__call__ = stepping, grading
    train.entry()


if __name__ == "__main__":
    main()
