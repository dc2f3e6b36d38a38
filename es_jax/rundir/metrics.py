"""What a run reports about itself: jsonl files, TensorBoard, and the lines on the screen."""

import importlib.util
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm.auto import tqdm

from es_jax.core import processes
from es_jax.rundir.directory import writing

LAST = 2**62  # larger than any step
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"


class Jsonl:
    """A file of JSON rows, each with a `step`. Opening it drops the rows of steps after `last_step`, which did not
    finish. Of several processes the first one writes."""

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
    """A row as JSON; NaN and infinity become null, since JSON has neither."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_jsonl(
    path: Path,
    *,
    parse: Callable[[Any], Any] = lambda row: row,
    damage: str = "is not JSON ({}): restore or delete the file",
) -> list[Any]:
    """The rows of a file, without a last line that a crash cut short; [] if there is no file. Raises ValueError that
    names a damaged line."""
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
    """The rows of a `Jsonl`. Raises ValueError for a line without a step."""

    def row(fields: Any) -> dict[str, Any]:
        if not isinstance(fields, dict) or type(fields.get("step")) is not int:
            raise ValueError("it has no step")
        return fields

    return read_jsonl(path, parse=row, damage="cannot be read ({}): restore or delete the file")


class Metrics:
    """Writes the same numbers to metrics.jsonl and to TensorBoard. Of several processes the first one writes.

    The caller's thread writes the events: the usual writer has its own thread, which a full disk ends without an error.
    """

    def __init__(self, workdir: Path, *, last_step: int):
        self._jsonl = Jsonl(workdir / "metrics.jsonl", last_step=last_step)
        self._folder, self._board = workdir / "tb", None
        if processes.first():
            with writing(self._folder):
                self._folder.mkdir(exist_ok=True)
                self._board = EventsWriter(str(self._folder / "events"))
            restart = SessionLog(status=SessionLog.START)  # makes TensorBoard drop later steps of an earlier session
            self._events(Event(step=last_step + 1, session_log=restart))

    def write(self, row: dict[str, Any], *, prefix: str = "train") -> None:
        """Write a step's row; its numbers go to TensorBoard under `prefix`."""
        if prefix == "train":
            self._jsonl.write(row)
        values = numbers(row, prefix)
        self._events(*(Event(step=row["step"], summary=scalar(name, x)) for name, x in values.items()))

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


def numbers(row: Mapping[str, Any], prefix: str) -> dict[str, int | float]:
    """The numbers of a row without its step, by their names in TensorBoard: "train/reward_mean"."""
    return {f"{prefix}/{name}": x for name, x in row.items() if name != "step" and isinstance(x, int | float)}


def how_to_look(folder: Path) -> str:
    """The command that shows a TensorBoard folder, and the extra to install if TensorBoard is missing."""
    command = f"tensorboard --logdir {shlex.quote(str(folder))}"
    absent = importlib.util.find_spec("tensorboard") is None
    return f"curves: pip install 'es_jax[tensorboard]', then {command}" if absent else f"curves: {command}"


def say(text: str) -> None:
    """Print a line above any progress bar; in a log file with the time. Only the first process prints."""
    if processes.first():
        tqdm.write(text if sys.stderr.isatty() else f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr)


class Progress:
    """The progress of a run. In a terminal it is one bar over the units of all steps, such as ("member", 30), with the
    ETA; in a log file the ETA is in the lines. The ETA follows from the pace since the end of the first step, because
    that step compiles. Steps print a line at most every two seconds; in a log file a long step also prints one every
    minute."""

    def __init__(self, *, steps: int, done: int, unit: tuple[str, int]):
        self._name, self._each, self._steps, self._count = f"{unit[0]}s", unit[1], steps, done * unit[1]
        self._bar = tqdm(
            total=steps * self._each, initial=self._count, unit=self._name, bar_format=BAR, dynamic_ncols=True,
            disable=None if processes.first() else True,  # None: shown in a terminal only
        )  # fmt: skip
        self._first: tuple[float, int] | None = None  # end of the first step since the start, and the units by then
        self._last = time.monotonic()  # time of the last line

    def advance(self, n: int) -> None:
        self._count += n
        if self._bar.disable:
            step, part = divmod(self._count, self._each)
            if part and time.monotonic() - self._last >= 60:
                self._line(f"step {step + 1}/{self._steps}  {part} of {self._each} {self._name}{self._eta}")
        else:
            self._bar.set_postfix_str(self._eta.strip(), refresh=False)
            self._bar.update(n)

    @property
    def _eta(self) -> str:
        """ "  ETA 3:10"; "" before the second step, when the pace is not known."""
        if self._first is None or self._count == self._first[1]:
            return ""
        pace = (time.monotonic() - self._first[0]) / (self._count - self._first[1])
        return f"  ETA {tqdm.format_interval(pace * (self._steps * self._each - self._count))}"

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        say(text)

    def step(self, row: dict[str, Any]) -> None:
        step, first = row["step"], "seconds_to_first_step" in row
        if first:
            self._first = time.monotonic(), step * self._each
            start = f"{row['seconds_to_first_step']:.1f} s after the start"
            say(f"first step done {start}, with loading, compiling and any evaluation before it")
        if time.monotonic() - self._last < 2 and not first and step < self._steps:
            return
        theory = "" if row["drift_theory"] is None else f" (theory {row['drift_theory']:.4g})"
        self._line(
            f"step {step}/{self._steps}  reward {row['reward_mean']:.4f} ± {row['reward_std']:.4f}  "
            f"{row['tokens_per_second']:.0f} tokens/s  drift {row['drift']:.4g}{theory}  "
            f"{row['seconds']:.1f} s/step{self._eta if self._bar.disable else ''}"
        )

    def close(self) -> None:
        self._bar.close()
