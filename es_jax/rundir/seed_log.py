"""seedlog.jsonl: one line a step, from which the weights of every step can be rebuilt.

A line ends with the sum of what stands before it, so that a changed digit is not another step. Between the steps there
may be lines that tell a change of sizes on which no step depends, but last bits of its completions do.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Change:
    """Sizes of decoding that became others when the run went on.

    Attributes:
      after: the step after which they count.
      changed: fields of the config, each with its values before and from there on.
    """

    after: int
    changed: dict[str, list[Any]]


class SeedLog:
    """The log of a run directory. A step is finished once its line is on disk.

    A line that a crash left half-written at the end is not a finished step: it is cut off when the log is opened.
    """

    def __init__(self, workdir: Path):
        self.path = Path(workdir) / NAME
        lines = _read(workdir)
        self.entries = [line for line in lines if isinstance(line, Entry)]
        self.changes = [line for line in lines if isinstance(line, Change)]
        if processes.first():
            with writing(self.path), open(self.path, "a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                sync_folder(self.path.parent)

    def append(self, entry: Entry) -> None:
        """Write the step's line and force it to disk; of several processes the first one does."""
        self._write(entry)
        self.entries.append(entry)

    def resize(self, sizes: Mapping[str, tuple[Any, Any]]) -> None:
        """Write a line for fields of the config that are not what they were, if there are such: their values (before,
        now). What was before is what the log's last line about a field says, where there is one."""
        last = {name: now for change in self.changes for name, (_, now) in change.changed.items()}
        was = {name: last.get(name, before) for name, (before, _) in sizes.items()}
        changed = {name: [was[name], now] for name, (_, now) in sizes.items() if was[name] not in (None, now)}
        if changed:
            self._write(change := Change(len(self.entries), changed))
            self.changes.append(change)

    def cut(self, step: int) -> None:
        """Forget the steps after that one: for a method whose steps must be made again from a checkpoint. What changed
        since then is told after it."""
        late = [dataclasses.replace(change, after=step) for change in self.changes if change.after > step]
        self.changes = [change for change in self.changes if change.after <= step] + late
        if processes.first():
            early = [line for line in _lines(self.path) if _step_of(line) <= step]
            partial = self.path.with_suffix(".tmp")
            with writing(self.path):
                with open(partial, "wb") as file:
                    file.writelines([*early, *map(_encoded, late)])
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, self.path)
                sync_folder(self.path.parent)
        del self.entries[step:]

    def _write(self, line: Entry | Change) -> None:
        if processes.first():
            with writing(self.path), open(self.path, "ab") as file:
                before = file.tell()
                try:
                    file.write(_encoded(line))
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), before)
                    raise


def read_entries(workdir: Path) -> list[Entry]:
    """The finished steps in a run's directory; nothing in it is changed. Raises ValueError where its log is damaged."""
    return [line for line in _read(workdir) if isinstance(line, Entry)]


def steps_done(workdir: Path) -> int:
    """How many steps are finished in a run's directory; no line is parsed, so none is found damaged."""
    return sum(map(_is_step, _lines(Path(workdir) / NAME)))


def digest(workdir: Path, steps: int) -> str:
    """sha256, in hex, of the lines of the first so many steps."""
    lines = [line.rstrip(b"\n") for line in _lines(Path(workdir) / NAME) if _is_step(line)] if steps else []
    return hashlib.sha256(b"\n".join(lines[:steps])).hexdigest()


def _read(workdir: Path) -> list[Entry | Change]:
    path = Path(workdir) / NAME
    damage = "the log is damaged; restore the file, or cut it before this line to fall back to that step"
    lines = read_jsonl(path, parse=_parse, damage=f"cannot be read ({{}}): {damage}")
    last = 0
    for number, line in enumerate(lines, 1):
        step = line.step if isinstance(line, Entry) else line.after
        if step != last + isinstance(line, Entry):
            what = f"step {step}" if isinstance(line, Entry) else f"a change after step {step}"
            raise ValueError(f"{path} line {number} is {what}: lines are missing; restore the file")
        last = step
    return lines


def _lines(path: Path) -> list[bytes]:
    """The whole lines of the file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def _is_step(line: bytes) -> bool:
    return b'"changed"' not in line


def _step_of(line: bytes) -> int:
    fields = json.loads(line)
    return fields["after"] if "changed" in fields else fields["step"]


def _parse(fields: dict) -> Entry | Change:
    """The content of a line; lines of earlier versions have no sum."""
    if (SUM in fields or "changed" in fields) and fields.pop(SUM, None) != _sum(fields):
        raise ValueError("its numbers are not those of its sum")
    return Change(**fields) if "changed" in fields else Entry(**fields)


def _encoded(line: Entry | Change) -> bytes:
    fields = dataclasses.asdict(line)
    return json.dumps(fields | {SUM: _sum(fields)}).encode() + b"\n"


def _sum(fields: dict) -> str:
    """The first 16 digits of the sha256 of the fields as JSON."""
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]
