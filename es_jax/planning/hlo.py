"""What a compiled program sends between devices, read from its HLO text.

A collective inside a loop is sent once a turn. The compiler writes down how often a loop turns where it knows it; the
loops of decoding end when all rows have stopped, so their turns are given by the caller.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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


def collectives(text: str, axes: dict[str, int], *, turns: Mapping[str, float]) -> list[Collective]:
    """The exchanges of a compiled program, equal ones added up, largest first.

    Args:
      text: of `Compiled.as_text()`.
      axes: the mesh's axes with their sizes, in its order; devices count through them, the last one fastest.
      turns: of the loops whose number the compiler does not know, by a scope (`jax.named_scope`) that they are in, the
        innermost that is known; "" is for all others. Of branches, the one that sends most is taken.

    Raises:
      ValueError: groups of devices in a form that is not known.
    """
    found = _Reader(*_computations(text), axes, turns).of_entry()
    kinds = [dataclasses.replace(kind, times=max(round(times), 1)) for kind, times in found.items()]
    return sorted(kinds, key=lambda kind: -kind.bytes * kind.times)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Adds up what computations send; a `Collective` counts as a key, its own `times` at 1."""

    bodies: dict[str, list[_Line]]
    entry: str
    axes: dict[str, int]
    turns: Mapping[str, float]
    known: dict[str, Counter] = dataclasses.field(default_factory=dict)

    def of_entry(self) -> Counter:
        return self._of(self.entry)

    def _of(self, name: str) -> Counter:
        """What one run of a computation sends."""
        if name not in self.known:
            total: Counter = Counter()
            for line in self.bodies.get(name, ()):
                total.update(self._of_line(line))
            self.known[name] = total
        return self.known[name]

    def _of_line(self, line: _Line) -> Counter:
        if line.op.removesuffix("-start") in OPS:
            kind = self._kind(line)
            return Counter({kind: 1} if kind.size > 1 else {})
        called = [
            self._of(name.strip().lstrip("%"))
            for several, one in _CALLED.findall(line.rest)
            for name in (several or one).split(",")
        ]
        if line.op == "conditional":
            return max(called, key=_sent, default=Counter())
        total = sum(called, Counter())
        repeat = self._repeat(line.rest) if line.op == "while" and total else 1
        return Counter({kind: times * repeat for kind, times in total.items()})

    def _kind(self, line: _Line) -> Collective:
        op = line.op.removesuffix("-start")
        groups = _groups(line.rest, math.prod(self.axes.values()))
        arriving = _result_bytes(op, line.shape, line.op != op)
        return Collective(op, arriving, 1, _along(groups, self.axes), len(groups), max(map(len, groups), default=1))

    def _repeat(self, rest: str) -> float:
        """Turns of a loop: as the compiler writes them, or the bound in a condition that is nothing but i < bound."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", rest)
        lines = self.bodies.get(condition[1], []) if condition else []
        root = next((line for line in lines if line.root), None)
        bounds = [line.rest.partition(")")[0] for line in lines if line.op == "constant"]
        if root is not None and root.op == "compare" and "direction=LT" in root.rest and len(bounds) == 1:
            return int(bounds[0])
        scope = re.search(r'op_name="([^"]*)"', rest)
        places = {name: scope[1].rfind(name) if scope else -1 for name in self.turns if name}
        inner = max(places, key=lambda name: places[name], default="")
        return self.turns[inner] if inner and places[inner] >= 0 else self.turns.get("", 1)


def _sent(found: Counter) -> float:
    return sum(kind.sent * times for kind, times in found.items())


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
