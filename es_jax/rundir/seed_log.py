"""seedlog.jsonl: one line a step, from which the weights of every step can be rebuilt.

A line ends with the sum of what stands before it, so that a changed digit is not another step.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from es_jax.core import processes
from es_jax.es.population import Members
from es_jax.rundir.directory import sync_folder, writing
from es_jax.rundir.metrics import read_jsonl

NAME, SUM = "seedlog.jsonl", "sum"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What led from the weights of step − 1 to those of `step`, with the run's config.

    Attributes:
      seeds, signs, paired: the members, as in `Members`.
      rewards: [N] as scored, before shaping; None for one that was not finite.
      weights: [N] float32 as the estimate used them; JSON carries them exactly.
      learning_rate, sigma, strength: α, σ and λ of the step; None in logs from before they had schedules.
    """

    step: int
    seeds: list[int]
    signs: list[int]
    paired: bool
    rewards: list[float | None]
    weights: list[float]
    learning_rate: float | None = None
    sigma: float | None = None
    strength: float | None = None

    @classmethod
    def of(
        cls, step: int, members: Members, *, rewards: np.ndarray, weights: np.ndarray, rates: Iterable[float] = ()
    ) -> "Entry":
        """`rates`: α, σ and λ of the step, for methods that have them."""
        seeds, signs = np.asarray(members.seed).tolist(), np.asarray(members.sign).astype(int).tolist()
        finite = [float(r) if np.isfinite(r) else None for r in rewards]
        return cls(step, seeds, signs, members.paired, finite, weights.tolist(), *rates)

    @property
    def members(self) -> Members:
        return Members(jnp.array(self.seeds, jnp.uint32), jnp.array(self.signs, jnp.float32), paired=self.paired)


class SeedLog:
    """The log of a run directory. A step is finished once its line is on disk.

    A line that a crash left half-written at the end is not a finished step: it is cut off when the log is opened.
    """

    def __init__(self, workdir: Path):
        self.path = Path(workdir) / NAME
        self.entries = read_entries(workdir)
        if processes.first():
            with writing(self.path), open(self.path, "a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                sync_folder(self.path.parent)

    def append(self, entry: Entry) -> None:
        """Write the step's line and force it to disk; of several processes the first one does."""
        if processes.first():
            with writing(self.path), open(self.path, "ab") as file:
                before = file.tell()
                try:
                    fields = dataclasses.asdict(entry)
                    file.write(json.dumps(fields | {SUM: _sum(fields)}).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), before)
                    raise
        self.entries.append(entry)

    def cut(self, step: int) -> None:
        """Forget the lines after that step: for a method whose steps must be made again from a checkpoint."""
        if processes.first():
            with writing(self.path), open(self.path, "r+b") as file:
                file.truncate(sum(map(len, file.read().splitlines(keepends=True)[:step])))
                os.fsync(file.fileno())
        del self.entries[step:]


def read_entries(workdir: Path) -> list[Entry]:
    """The finished steps in a run's directory; nothing in it is changed. Raises ValueError where its log is damaged."""
    path = Path(workdir) / NAME
    damage = "the log is damaged; restore the file, or cut it before this line to fall back to that step"
    entries = read_jsonl(path, parse=_entry, damage=f"cannot be read ({{}}): {damage}")
    for number, entry in enumerate(entries, 1):
        if entry.step != number:
            raise ValueError(f"{path} line {number} is step {entry.step}: lines are missing; restore the file")
    return entries


def _entry(fields: dict) -> Entry:
    """The entry of a line; lines of earlier versions have no sum."""
    if SUM in fields and fields.pop(SUM) != _sum(fields):
        raise ValueError("its numbers are not those of its sum")
    return Entry(**fields)


def _sum(fields: dict) -> str:
    """The first 16 digits of the sha256 of the fields as JSON."""
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]
