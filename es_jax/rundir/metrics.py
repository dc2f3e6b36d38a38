"""What a run writes about itself: jsonl files, TensorBoard, and the lines a person watches."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm.auto import tqdm

from es_jax.core import processes
from es_jax.rundir.directory import writing

LAST = 2**62  # a step after every step


class Jsonl:
    """A file of JSON rows, each with a `step`. Rows of later steps than `last_step`, which did not finish, are dropped
    when it is opened. Of several processes the first one writes."""

    def __init__(self, path: Path, *, last_step: int = LAST):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_rows(path) if row["step"] <= last_step]
        self.steps = {row["step"] for row in rows}
        content = path.read_bytes() if path.exists() else b""
        if processes.first() and content.split(b"\n")[len(rows) :] != [b""]:
            partial = path.with_suffix(".tmp")
            with writing(path):
                partial.write_text("".join(map(_line, rows)))
                os.replace(partial, path)

    def write(self, *rows: dict[str, Any]) -> None:
        if processes.first():
            with writing(self.path), open(self.path, "a") as file:
                file.writelines(map(_line, rows))
        self.steps |= {row["step"] for row in rows}


def _line(row: dict[str, Any]) -> str:
    """A row as JSON; NaN and infinity are null, for JSON does not have them."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_jsonl(
    path: Path,
    *,
    parse: Callable[[Any], Any] = lambda row: row,
    damage: str = "is not JSON ({}): restore or delete the file",
) -> list[Any]:
    """The rows of a file, without a last line that a crash cut short; [] when there is no file. Raises ValueError for
    a damaged line, which is named."""
    if not Path(path).exists():
        return []
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(parse(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} line {number} {damage.format(error)}") from None
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `Jsonl`. Raises ValueError for a line that has no step."""

    def row(fields: Any) -> dict[str, Any]:
        if not isinstance(fields, dict) or type(fields.get("step")) is not int:
            raise ValueError("it has no step")
        return fields

    return read_jsonl(path, parse=row, damage="cannot be read ({}): restore or delete the file")


class Metrics:
    """metrics.jsonl and TensorBoard, the same numbers in both. Of several processes the first one writes.

    Events are written by the caller's thread: the usual writer has its own, which dies of a full disk unheard.
    """

    def __init__(self, workdir: Path, *, last_step: int):
        self._jsonl = Jsonl(workdir / "metrics.jsonl", last_step=last_step)
        self._folder, self._board = workdir / "tb", None
        if processes.first():
            with writing(self._folder):
                self._folder.mkdir(exist_ok=True)
                self._board = EventsWriter(str(self._folder / "events"))
            restart = SessionLog(status=SessionLog.START)  # TensorBoard drops an earlier session's later steps
            self._events(Event(step=last_step + 1, session_log=restart))

    def write(self, row: dict[str, Any], *, prefix: str = "train") -> None:
        """A step's row; numbers go to TensorBoard under `prefix`."""
        if prefix == "train":
            self._jsonl.write(row)
        numbers = {name: x for name, x in row.items() if name != "step" and isinstance(x, int | float)}
        self._events(*(Event(step=row["step"], summary=scalar(f"{prefix}/{name}", x)) for name, x in numbers.items()))

    def _events(self, *events: Event) -> None:
        if self._board:
            with writing(self._folder):
                for event in events:
                    event.wall_time = time.time()
                    self._board.write_event(event)
                self._board.flush()

    def close(self) -> None:
        if self._board:
            with writing(self._folder):
                self._board.close()


def say(text: str) -> None:
    """A line for the person who watches, above any bar; of the first process."""
    if processes.first():
        tqdm.write(text, file=sys.stderr)


class Progress:
    """A bar over the units of all steps, ("member", 30) of each, and a line for a step at most every two seconds."""

    def __init__(self, *, steps: int, done: int, unit: tuple[str, int]):
        name, each = unit
        counts, quiet = {"total": steps * each, "initial": done * each, "unit": name}, not processes.first()
        self._bar = tqdm(**counts, smoothing=0.05, dynamic_ncols=True, disable=quiet)
        self._steps, self._done, self._start, self._last = steps, done, time.monotonic(), 0.0

    def advance(self, n: int) -> None:
        self._bar.update(n)

    def step(self, row: dict[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        if "seconds_to_first_step" in row:
            start = f"{row['seconds_to_first_step']:.1f} s after the start"
            say(f"first step done {start}, with loading, compiling and any evaluation before it")
        if now - self._last < 2 and step < self._steps:
            return
        self._last = now
        eta = (now - self._start) / max(step - self._done, 1) * (self._steps - step)
        theory = "" if row["drift_theory"] is None else f" (theory {row['drift_theory']:.4g})"
        say(
            f"step {step}/{self._steps}  reward {row['reward_mean']:.4f} ± {row['reward_std']:.4f}  "
            f"{row['tokens_per_second']:.0f} tokens/s  drift {row['drift']:.4g}{theory}  "
            f"{row['seconds']:.1f} s/step  ETA {tqdm.format_interval(eta)}"
        )

    def close(self) -> None:
        self._bar.close()
