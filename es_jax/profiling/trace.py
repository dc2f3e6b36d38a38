"""Traces of steps. They show what the host's clock cannot: prefill and decode separately, which are one program.

The operations of prefill carry the scope `fill` of `es_jax.generate.decode_spec`. XLA fuses estimate and optimizer
(dev/LOG.md), so `State.estimate_seconds` times the estimate alone. So far only traces of CPUs have been read.
"""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from es_jax.generate.decode_spec import FILL
from es_jax.profiling.clock import Seconds, columns

PROGRAMS = {  # names of jit → part
    "_perturb": "perturb",
    "shared_weights": "perturb",
    "member_pairs": "perturb",
    "_decode": "decode",
    "rollout": "decode",
    "update": "update",
}


class Profile:
    """A TensorBoard trace of the steps from `start` to `stop` − 1, and its summary in profile.json. It ends with the
    run's `last` step at the latest."""

    def __init__(self, steps: tuple[int, ...], workdir: Path, *, last: int):
        self._steps, self._workdir, self._running, self._last = steps, workdir, False, last
        self._timings: list[Mapping[str, Any]] = []  # for each traced step

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """A context to run the step in."""
        if self._steps and not self._running and step in range(*self._steps):
            jax.profiler.start_trace(str(self._workdir / "tb"))
            self._running = True
        return jax.profiler.StepTraceAnnotation("step", step_num=step)

    def done(self, step: int, timings: Mapping[str, Any], inside: Callable[[], Mapping[str, float]]) -> str | None:
        """Call it after a step, with its seconds and tokens in `timings`; returns a summary after the last traced step.

        `inside` returns seconds of parts that a trace cannot separate from their program; all processes call it.
        """
        if not self._running:
            return None
        self._timings.append(timings)
        if step < min(self._steps[1] - 1, self._last):
            return None
        self.close()
        seconds_inside = inside()
        return self._summary(step, seconds_inside) if jax.process_index() == 0 else None

    def _summary(self, step: int, inside: Mapping[str, float]) -> str:
        """Writes profile.json: means over the traced steps and the devices that this process sees."""
        count = len(self._timings)
        first, names = step - count + 1, ("seconds", "prompt_tokens", "tokens", "seconds_grade")
        total, prompt, new, grade = (sum(timings[name] for timings in self._timings) / count for name in names)
        try:
            parts = part_seconds(self._workdir / "tb")
        except Exception as error:  # an unknown format is no reason to end a run
            return f"the trace of steps {first} to {step} could not be read: {error!r}"
        if not parts:
            return f"the trace of steps {first} to {step} names none of the run's programs"
        parts = {part: value / count for part, value in parts.items()}
        parts["wait"] = max(total - sum(parts.values()), 0.0)
        parts |= {"grade": grade, **inside}  # parallel to the devices' work, or inside it: not part of the sum
        row = {
            "first": first,
            "last": step,
            "seconds": total,
            **columns(parts, total),
            "prompt_tokens": prompt,
            "tokens": new,
            "prefill_tokens_per_second": prompt / parts["prefill"] if parts["prefill"] else None,
            "decode_tokens_per_second": new / parts["decode"] if parts["decode"] else None,
        }
        (self._workdir / "profile.json").write_text(json.dumps(row, indent=2) + "\n")
        shares = ", ".join(f"{part} {value / total:.1%}" for part, value in parts.items())
        return f"traced steps {first} to {step}, {total:.2f} s each: {shares}; see profile.json"

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def part_seconds(folder: Path) -> Seconds:
    """Seconds in perturb, prefill, decode and update over all steps of the last trace in a folder, as the mean over
    devices.

    Only events that began within a step count, and parallel events count once. {} if no known program is named.
    """
    data = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime).read_bytes()
    programs = dict(program for plane in _fields(data, 1) for program in _programs(plane))
    planes = list(jax.profiler.ProfileData.from_serialized_xspace(data).planes)
    steps = [_span(e) for plane in planes for line in plane.lines for e in line.events if e.name == "step"]
    devices = []
    for plane in planes:
        events = [
            (event, dict(event.stats))
            for line in plane.lines
            for event in line.events  # except calls of Python, and evaluations
            if not event.name.startswith("$") and any(a <= event.start_ns <= b for a, b in steps)
        ]
        operations: dict[tuple[str, Any], set[str]] = defaultdict(set)
        for _, stats in events:
            operations[_module(stats), stats.get("program_id")].add(str(stats.get("hlo_op")))
        scopes = {program: _scopes(programs, *program, names) for program, names in operations.items()}
        spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for event, stats in events:
            module, scope = _module(stats), scopes[_module(stats), stats.get("program_id")]
            name = str(stats.get("tf_op") or scope.get(str(stats.get("hlo_op")), ""))
            program = re.match(r"jit_(\w+)", module) or re.match(r"jit\((\w+)\)", name)
            if program and (part := PROGRAMS.get(program[1])):
                spans[part].append(_span(event))
                if part == "decode" and re.search(rf"\b{FILL}\b", name):
                    spans["prefill"].append(_span(event))
        if spans:
            seconds = {part: _covered(spans[part]) for part in ("perturb", "prefill", "decode", "update")}
            devices.append(seconds | {"decode": seconds["decode"] - seconds["prefill"]})
    return {part: sum(each[part] for each in devices) / len(devices) for part in devices[0]} if devices else {}


def _module(stats: Mapping[str, Any]) -> str:
    return str(stats.get("hlo_module", ""))


def _scopes(programs: Mapping[str, Mapping[str, str]], module: str, number: Any, names: set[str]) -> Mapping[str, str]:
    """Operation → scopes of the program whose operations have those names. A trace holds all programs of a process, and
    several may have the same name. If a program comes from the compilation cache, its number differs from the number in
    its events."""
    alike = [(program, scopes) for program, scopes in programs.items() if program.rpartition("(")[0] == module]
    exact = f"{module}({number})"
    return max(alike, key=lambda pair: (len(names & pair[1].keys()), pair[0] == exact), default=("", {}))[1]


def _span(event: Any) -> tuple[float, float]:
    return event.start_ns, event.start_ns + event.duration_ns


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds covered by at least one of the spans, which are in ns."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        total, end = total + max(b - max(a, end), 0.0), max(end, b)
    return total / 1e9


def _programs(plane: bytes) -> Iterator[tuple[str, dict[str, str]]]:
    """The programs in a plane of the trace (an XPlane), such as "jit__decode(8)": operation → its scopes.

    ProfileData leaves them out. The numbers are fields of xplane.proto and hlo.proto: plane.event_metadata → its value,
    with a name and stats.bytes_value → HloProto.hlo_module.computations.instructions, each with a name and
    metadata.op_name.
    """
    for program in (value for entry in _fields(plane, 4) for value in _fields(entry, 2)):
        modules = (m for stat in _fields(program, 5) for proto in _fields(stat, 6) for m in _fields(proto, 1))
        instructions = (i for m in modules for computation in _fields(m, 3) for i in _fields(computation, 2))
        yield _text(program, 2), {_text(i): _text(metadata, 2) for i in instructions for metadata in _fields(i, 7)}


def _text(message: bytes, field: int = 1) -> str:
    return b"".join(_fields(message, field)[:1]).decode(errors="replace")


def _fields(message: bytes, number: int) -> list[bytes]:
    """The values of one length-delimited field of a serialised protocol buffer."""
    fields = UnknownFieldSet(Empty.FromString(message))
    return [field.data for field in fields if (field.field_number, field.wire_type) == (number, 2)]
