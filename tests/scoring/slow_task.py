"""A task for tests of worker processes; a worker imports this module."""

import dataclasses
import os
import signal
import sys
import time

from es_jax.tasks import Score


@dataclasses.dataclass(frozen=True)
class Slow:
    """Scores take as long as the completion says, unless that is "bad", "die" or "spin"; parts tell the process, and
    whether it has JAX."""

    name: str = "slow"
    workers: int = 2
    timeout_seconds: float | None = None

    def score(self, example, completion):
        if completion == "bad":
            raise KeyError("no such thing")
        if completion == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if completion == "spin":
            7**10**8  # which no signal interrupts
        time.sleep(float(completion))
        return Score(float(example.id), {"pid": os.getpid(), "jax": "jax" in sys.modules})
