"""A task for tests of worker processes; a worker imports this module."""

import dataclasses
import os
import sys
import time

from es_jax.tasks import Score


@dataclasses.dataclass(frozen=True)
class Slow:
    """Scores take as long as the completion says; a part tells the process, another whether it has JAX."""

    name: str = "slow"
    workers: int = 2

    def score(self, example, completion):
        if completion == "bad":
            raise KeyError("no such thing")
        time.sleep(float(completion))
        return Score(float(example.id), {"pid": os.getpid(), "jax": "jax" in sys.modules})
