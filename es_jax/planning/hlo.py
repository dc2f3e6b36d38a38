"""Reads from a compiled program's HLO text what it sends between devices.

A collective inside a loop runs once per iteration. The compiler records the number of iterations if it knows it. The
loops of decoding end when all rows have stopped, so the caller gives their numbers.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
       "collective-broadcast")  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_OPERANDS = re.compile(r"[^()]*(?:\((?:[^()]|\([^()]*\))*\)[^()]*)*")  # up to the bracket that closes them
ARRAY = re.compile(r"\b(?:pred|(?:bf|[sufc])(\d+)(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")  # bits, shape, layout
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
ENTRY = "ENTRY"


class Instruction(NamedTuple):
    """One line of a program: name = shape op(operands), attributes."""

    root: bool
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it uses."""
        return re.findall(r"%([\w.\-]+)", _OPERANDS.match(self.rest)[0])  # type: ignore[index]

    def called(self, role: str) -> list[str]:
        """The computations named by that attribute."""
        match = re.search(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", match[1]) if match else []


class Collective(NamedTuple):
    """One kind of collective in a program."""

    op: str  # one of `OPS`
    bytes: int  # bytes of its result on one device, each time
    times: int  # how often a run of the program does it
    axes: tuple[str, ...]  # axes of the mesh along which it goes; none if its groups are single devices
    groups: int  # number of device groups, each with its own exchange
    group_size: int

    @property
    def sent(self) -> float:
        """The least bytes that a device sends in a run of the program, by any algorithm."""
        others = self.group_size - 1
        share = others / self.group_size
        shares = {"all-gather": share, "all-to-all": share, "all-reduce": 2 * share, "reduce-scatter": others}
        return self.bytes * shares.get(self.op, 1) * self.times


def collectives(text: str, axes: dict[str, int], *, turns: Mapping[str, float]) -> list[Collective]:
    """The collectives of a compiled program, with equal ones merged, largest first. Of branches, the one that sends
    most counts.

    Args:
      text: the text of `Compiled.as_text()`.
      axes: the mesh's axes with their sizes, in its order; devices count through them, the last one fastest.
      turns: numbers of iterations that the compiler does not know, by the scope (`jax.named_scope`) of the loop; the
        innermost given scope counts, and "" is for all others.
    """
    bodies = computations(text)

    @functools.cache
    def exchanges(name: str) -> Counter:
        """For one run of a computation: a `Collective` with `times` 1 → how often it runs."""
        total: Counter = Counter()
        for instruction in bodies.get(name, ()):
            if instruction.op.removesuffix("-start") in OPS:
                kind = _collective(instruction, axes)
                total.update([kind] if kind.group_size > 1 else [])
                continue
            called = [*map(exchanges, re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(instruction.rest))))]
            if instruction.op == "conditional":
                sent = lambda branch: sum(kind.sent * times for kind, times in branch.items())  # noqa: E731
                called = [max(called, key=sent, default=Counter())]
            inside = sum(called, Counter())
            repeat = turns_of(instruction.rest, bodies, turns) if instruction.op == "while" and inside else 1
            total.update({kind: times * repeat for kind, times in inside.items()})
        return total

    kinds = (x._replace(times=max(round(times), 1)) for x, times in exchanges(ENTRY).items())
    return sorted(kinds, key=lambda kind: -kind.bytes * kind.times)


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation by its name; the computation in which the program begins is `ENTRY`."""
    bodies: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(ENTRY if match[1] else match[2], [])
        elif match := _INSTRUCTION.match(line):
            current.append(Instruction(bool(match[1]), *match.groups()[1:]))
    return bodies


def turns_of(loop: str, bodies: Mapping[str, list[Instruction]], turns: Mapping[str, float]) -> float:
    """Iterations of a loop: as recorded by the compiler, or the bound in a condition that is just i < bound."""
    if count := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop):
        return int(count[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    instructions = bodies.get(condition[1], []) if condition else []
    bounds = [one.rest.partition(")")[0] for one in instructions if one.op == "constant"]
    counts_up = any(one.root and one.op == "compare" and "direction=LT" in one.rest for one in instructions)
    if len(bounds) == 1 and counts_up:
        return int(bounds[0])
    return turns.get(scope_of(loop, turns), 1)


def scope_of(instruction: str, scopes: Iterable[str]) -> str:
    """The innermost of these scopes around an instruction; "" if there is none."""
    match = re.search(r'op_name="([^"]*)"', instruction)
    path = match[1] if match else ""
    return max((name for name in scopes if name and name in path), key=path.rfind, default="")


def _collective(instruction: Instruction, axes: dict[str, int]) -> Collective:
    """The collective of one instruction. A "-start" lists its inputs before its outputs, except for all-reduce."""
    op, arrays = instruction.op.removesuffix("-start"), ARRAY.findall(instruction.shape)
    sizes = [int(bits or 8) * math.prod(_numbers(shape)) // 8 for bits, shape, _ in arrays]
    if op == instruction.op or op == "all-reduce":
        arriving = sum(sizes)  # there may be several arrays
    else:
        arriving = sum(sizes[1:]) if op != "reduce-scatter" else min(sizes)
    groups = _groups(instruction.rest, math.prod(axes.values()))
    coordinates = [np.stack(np.unravel_index(group, tuple(axes.values()))) for group in groups]
    along = tuple(axis for i, axis in enumerate(axes) if any(np.ptp(group[i]) for group in coordinates))
    return Collective(op, arriving, 1, along, len(groups), max(map(len, groups), default=1))


def _groups(rest: str, devices: int) -> list[list[int]]:
    """The groups of device numbers of a collective."""
    if listed := re.search(r"(source_target_pairs|replica_groups)=\{((?:\{[\d, ]*\},? ?)*)\}", rest):
        groups = [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[2])]
        return groups if groups or listed[1] != "replica_groups" else [list(range(devices))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[^ ]*)", rest):
        return _iota(iota[2]).reshape(_numbers(iota[1])).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest):
        return _mesh_groups(*mesh.groups())
    raise ValueError(f"cannot read the device groups of a collective: {rest[:200]}")


def _iota(text: str) -> np.ndarray:
    """Device numbers in an order such as [2,4]T(1,0): enumerated over the shape, then transposed."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"cannot read the device groups of a collective: {text}")
    shape = _numbers(match[1])
    order = np.arange(math.prod(shape)).reshape(shape)
    return order.transpose(_numbers(match[2])) if match[2] else order


def _mesh_groups(axes: str, order: str | None, along: str) -> list[list[int]]:
    """Groups written as axes of a mesh, such as mesh['a'=2,'b'=4] {'b'}, optionally with the order of its devices."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    names = re.findall(r"'([^']+)'", along)
    if not names or not set(names) <= set(sizes):
        raise ValueError(f"cannot read the device groups of a collective: mesh[{axes}] {{{along}}}")
    grid = _iota(order or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
    grid = np.moveaxis(grid, [list(sizes).index(name) for name in names], range(-len(names), 0))
    return grid.reshape(-1, math.prod(sizes[name] for name in names)).tolist()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
