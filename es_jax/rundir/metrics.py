"""What a run writes about itself: jsonl files, TensorBoard, and the lines a person watches."""

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

LAST = 2**62  # a step after every step
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"


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
    """The numbers of a row but its step, by their names in TensorBoard: "train/reward_mean"."""
    return {f"{prefix}/{name}": x for name, x in row.items() if name != "step" and isinstance(x, int | float)}


def how_to_look(folder: Path) -> str:
    """The command that shows a folder of TensorBoard's, and the extra that brings it where it is not installed."""
    command = f"tensorboard --logdir {shlex.quote(str(folder))}"
    absent = importlib.util.find_spec("tensorboard") is None
    return f"curves: pip install 'es_jax[tensorboard]', then {command}" if absent else f"curves: {command}"


def say(text: str) -> None:
    """A line for the person who watches, above any bar; in a log file with the time. Of the first process."""
    if processes.first():
        tqdm.write(text if sys.stderr.isatty() else f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr)


class Progress:
    """In a terminal one bar over the units of all steps, ("member", 30) of each, which has the ETA; in a log file the
    lines have it. It follows from the pace since the end of the first step, for that one compiles. A step has a line at
    most every two seconds; in a log file a long step has one every minute, too."""

    def __init__(self, *, steps: int, done: int, unit: tuple[str, int]):
        self._name, self._each, self._steps, self._count = f"{unit[0]}s", unit[1], steps, done * unit[1]
        self._bar = tqdm(
            total=steps * self._each, initial=self._count, unit=self._name, bar_format=BAR, dynamic_ncols=True,
            disable=None if processes.first() else True,  # None: shown in a terminal alone
        )  # fmt: skip
        self._first: tuple[float, int] | None = None  # when the first step since the start was done, and the units then
        self._last = time.monotonic()  # of a line

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
        """ "  ETA 3:10"; nothing before the second step tells the pace."""
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
