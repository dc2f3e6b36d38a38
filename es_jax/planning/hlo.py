"""What a compiled program sends between devices, read from its HLO text.

A collective inside a loop is sent once a turn. The compiler writes down how often a loop turns where it knows it; the
loop of decode steps ends when all rows have stopped, so its turns are given by the caller.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
       "collective-broadcast")  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


class _Line(NamedTuple):
    root: bool
    shape: str
    op: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange of a program.

    Attributes:
      op: one of `OPS`.
      bytes: of its result on one device, each time.
      times: how often a run of the program does it.
      axes: the mesh axes that it goes along; empty where its groups are single devices.
      groups: how many groups of devices exchange, each for itself.
      size: devices in a group.
    """

    op: str
    bytes: int
    times: int
    axes: tuple[str, ...]
    groups: int
    size: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a run of the program, at least, by any algorithm."""
        share = (self.size - 1) / self.size
        shares = {"all-gather": share, "all-to-all": share, "all-reduce": 2 * share, "reduce-scatter": self.size - 1}
        return self.bytes * shares.get(self.op, 1) * self.times


def collectives(text: str, axes: dict[str, int], *, turns: int = 1) -> list[Collective]:
    """The exchanges of a compiled program, equal ones added up, largest first.

    Args:
      text: of `Compiled.as_text()`.
      axes: the mesh's axes with their sizes, in its order; devices count through them, the last one fastest.
      turns: of every loop whose number the compiler does not know.

    Raises:
      ValueError: groups of devices in a form that is not known.
    """
    found: dict[tuple, int] = {}
    for op, line, times in _instructions(text, turns):
        rest, started = line.rest, line.op.endswith("-start")
        groups = _groups(rest, math.prod(axes.values()))
        size = max(map(len, groups), default=1)
        if size == 1:
            continue
        key = (op, _result_bytes(op, line.shape, started), _along(groups, axes), len(groups), size)
        found[key] = found.get(key, 0) + times
    kinds = [Collective(op, n, times, along, many, size) for (op, n, along, many, size), times in found.items()]
    return sorted(kinds, key=lambda kind: -kind.bytes * kind.times)


def _instructions(text: str, turns: int) -> Iterator[tuple[str, _Line, int]]:
    """(op, its line, times) of every collective."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry, turns)
    for name, body in bodies.items():
        for line in body:
            base = line.op.removesuffix("-start")
            if base in OPS and times.get(name):
                yield base, line, times[name]


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """The lines of every computation, and the name of the one where the program begins."""
    bodies: dict[str, list[_Line]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_Line(bool(found[1]), *found.groups()[1:]))
    return bodies, entry


def _times(bodies: dict[str, list[_Line]], entry: str, turns: int) -> dict[str, int]:
    """How often each computation runs; of branches, each as if it were taken."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in bodies.get(name, ()):
            repeat = count * (_turns(bodies, line.rest, turns) if line.op == "while" else 1)
            for several, one in _CALLED.findall(line.rest):
                for called in (several or one).split(","):
                    visit(called.strip().lstrip("%"), repeat)

    visit(entry, 1)
    return times


def _turns(bodies: dict[str, list[_Line]], rest: str, unknown: int) -> int:
    """Of a loop: as written by the compiler, or the bound in a condition that is nothing but i < bound."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    lines = bodies.get(condition[1], []) if condition else []
    root = next((line for line in lines if line.root), None)
    bounds = [line.rest.partition(")")[0] for line in lines if line.op == "constant"]
    plain = root is not None and root.op == "compare" and "direction=LT" in root.rest
    return int(bounds[0]) if plain and len(bounds) == 1 else unknown


def _result_bytes(op: str, shape: str, started: bool) -> int:
    """Of what arrives. The "-start" form of all but all-reduce gives a tuple of what leaves and what arrives."""
    sizes = [_bits(kind) * math.prod(int(n) for n in dims.split(",") if n) // 8 for kind, dims in _SHAPE.findall(shape)]
    if not started or op == "all-reduce":
        return sum(sizes)  # perhaps several arrays at once
    return sum(sizes) - sizes[0] if op != "reduce-scatter" else min(sizes)


def _bits(kind: str) -> int:
    return _BITS.get(kind) or int(re.sub(r"e.*", "", kind[1:]))


def _groups(rest: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of device numbers of a collective."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
    if written := re.search(r"replica_groups=\{(\{[\d,{} ]*\})?\}", rest):
        groups = [tuple(map(int, one.split(","))) for one in re.findall(r"\{([\d, ]+)\}", written[1] or "")]
        return groups or [tuple(range(devices))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[^ ]*)", rest):
        return [tuple(group) for group in _iota(iota[2]).reshape(_numbers(iota[1])).tolist()]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"cannot read the device groups of a collective: {rest[:200]}")


def _iota(text: str) -> np.ndarray:
    """Device numbers in an order such as [2,4]T(1,0): counted through the shape, then transposed."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if shape is None:
        raise ValueError(f"cannot read the device groups of a collective: {text}")
    order = np.arange(math.prod(_numbers(shape[1]))).reshape(_numbers(shape[1]))
    return order.transpose(_numbers(shape[2])) if shape[2] else order


def _mesh_groups(axes: str, order: str | None, along: str) -> list[tuple[int, ...]]:
    """Groups written as axes of a mesh, such as mesh['a'=2,'b'=4] {'b'}, perhaps with the order of its devices."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    names = re.findall(r"'([^']+)'", along)
    if not names or not set(names) <= set(sizes):
        raise ValueError(f"cannot read the device groups of a collective: mesh[{axes}] {{{along}}}")
    grid = _iota(order or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
    grid = np.moveaxis(grid, [list(sizes).index(name) for name in names], range(-len(names), 0))
    return [tuple(group) for group in grid.reshape(-1, math.prod(sizes[name] for name in names)).tolist()]


def _along(groups: Sequence[tuple[int, ...]], axes: dict[str, int]) -> tuple[str, ...]:
    """Which coordinates differ within a group."""
    places = [np.stack(np.unravel_index(group, tuple(axes.values()))) for group in groups]
    return tuple(axis for i, axis in enumerate(axes) if any(len(set(place[i].tolist())) > 1 for place in places))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
