"""One process of a run of several, for tests: `python -m es_jax.train`, whose grading fails at $FAIL_AT if that is set.

$FAIL_AT is "RANK STEP": process RANK cannot grade its completions of that step.
"""

import os

import jax

from es_jax import train
from es_jax.training.grading import Grader
from es_jax.training.loop import _Run


def main() -> None:
    """The command, with a fault where one is asked for."""
    rank, step = map(int, os.environ.get("FAIL_AT", "-1 -1").split())
    now, collect, grade = [0], _Run._collect, Grader.__call__

    def collecting(self, step):
        now[0] = step
        return collect(self, step)

    def grading(self, *args):
        if (jax.process_index(), now[0]) == (rank, step):
            raise ValueError("the grader broke")
        return grade(self, *args)

    _Run._collect, Grader.__call__ = collecting, grading
    train.entry()


if __name__ == "__main__":
    main()
