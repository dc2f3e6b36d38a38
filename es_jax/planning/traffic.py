"""Counts, from HLO text, the bytes that a compiled program reads and writes in a device's memory, and its kernels.

Each kernel counts separately, in each iteration of its loops, with what it reads of its operands and what it writes.

- If an operand is sliced or gathered from, even inside a fusion, only the pieces count.
- An update in place (dynamic-update-slice, scatter) counts only what it writes, not what it leaves unchanged.
- Of several branches only one counts: the branch that the caller names, or the one that moves most.
- A call that the compiler does not show inside counts all its operands and results, including its workspace. A call
that is in no table makes the bytes None, and is listed.
- Arrays count with their size in memory, including the padding of TPU tiles. Arrays in a TPU's fast memory (S(1) in the
text) and in host memory (S(5)) do not count.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from es_jax.planning.hlo import ARRAY, ENTRY, Instruction, computations, scope_of, turns_of

FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "domain", "partition-id", "replica-id",
})  # fmt: skip
HIDDEN = (
    "__cublas$", "__cudnn$", "__cub$", "__gpu$TopK", "TopK",
    "__gpu$xla.gpu.triton", "triton_kernel_call", "mosaic_gpu", "tpu_custom_call",
)  # fmt: skip
"""Prefixes of call targets, of libraries and Pallas, whose operands and results show what they move."""
FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked")
"""Calls that are only annotations of the TPU compiler and compute nothing."""

_PIECES = ("slice", "dynamic-slice", "gather")  # read a part of their first operand
_UPDATES = ("dynamic-update-slice", "scatter")  # write a part of it
_REPEATS = ("broadcast", "pad")  # a part of the result may need all of the operand
_WHOLE = ("dot", "convolution")  # the same, of both operands
Kernels = Mapping[str, Callable[[list[int], list[int]], float]]


class Traffic(NamedTuple):
    """The traffic in a run of a program, or of a part of it."""

    known: float = 0.0  # bytes of all known calls
    kernels: float = 0.0  # started kernels and copies
    unknown: frozenset[str] = frozenset()  # targets of unknown calls

    @property
    def bytes(self) -> float | None:
        """Bytes read and written; None if a call is unknown."""
        return None if self.unknown else self.known

    def plus(self, other: "Traffic", times: float = 1.0) -> "Traffic":
        """This plus `times` times the other."""
        if not times:
            return self
        moved, kernels = self.known + times * other.known, self.kernels + times * other.kernels
        return Traffic(moved, kernels, self.unknown | other.unknown)


class Array(NamedTuple):
    elements: int
    bytes: int  # in the device's memory


class _Needed(NamedTuple):
    """What an instruction needs of an operand: a share of it, possibly a piece that adds to other pieces."""

    operand: str
    share: float
    piece: bool = False


class TrafficCounter:
    """Counts what a compiled program moves.

    Args:
      text: of `Compiled.as_text()`.
      turns: as `hlo.collectives` takes them.
      branches: which branch of a conditional counts, by a scope as in `turns`; negative numbers count from the last.
      kernels: for calls that read more or less than their operands (a grid that reads a block several times, known
        lengths): a name in the call's text → a function from the bytes of operands and of results to the moved bytes.
        It takes precedence over the tables.
    """

    def __init__(
        self,
        text: str,
        *,
        turns: Mapping[str, float],
        branches: Mapping[str, int] = MappingProxyType({}),
        kernels: Kernels = MappingProxyType({}),
    ):
        self._bodies = computations(text)
        self._turns, self._branches, self._kernels = turns, branches, kernels
        self._run, self._updates = functools.cache(self._run), functools.cache(self._updates)  # type: ignore[method-assign]

    def program(self) -> Traffic:
        """The traffic of a run of the program."""
        return self._run(ENTRY)

    def turn(self, scope: str) -> Traffic | None:
        """The traffic of one iteration of the outermost loop in a scope (`jax.named_scope`); of several loops, the one
        that moves most. None if there is no loop."""
        turns = map(self._turn, self._loops(ENTRY, scope))
        return max(turns, key=lambda turn: turn.known, default=None)

    def _loops(self, name: str, scope: str) -> Iterator[Instruction]:
        known = {scope, *self._turns, *self._branches}
        for x in self._bodies[name]:
            if x.op == "while" and scope_of(x.rest, known) == scope:
                yield x
            elif x.op in ("while", "conditional", "call"):
                for inner in self._branch(x) if x.op == "conditional" else x.called("body") + x.called("to_apply"):
                    yield from self._loops(inner, scope)

    def _run(self, name: str) -> Traffic:
        """The traffic of a run of a computation."""
        values = {x.name: x for x in self._bodies[name]}
        return functools.reduce(Traffic.plus, (self._one(x, values) for x in values.values()), Traffic())

    def _one(self, x: Instruction, values: Mapping[str, Instruction]) -> Traffic:
        """The traffic of one instruction of a computation."""
        if x.op in FREE or x.op.endswith("-done"):
            return Traffic()
        if x.op == "while":
            return Traffic().plus(self._turn(x), turns_of(x.rest, self._bodies, self._turns))
        if x.op in ("conditional", "call"):
            called = self._branch(x) if x.op == "conditional" else x.called("to_apply")
            return functools.reduce(Traffic.plus, map(self._run, called), Traffic())
        x = _started(x, values)
        if x.op == "custom-call":
            return self._call(x, values)
        read = sum(need.share * _bytes(values[need.operand].shape) for need in self._needs(x, values, 1.0, {x.name}))
        return Traffic(read + self._written(x, values), 1, frozenset(self._hidden(x)))

    def _turn(self, loop: Instruction) -> Traffic:
        """The traffic of one iteration; the condition does not count if the number of iterations is known."""
        body, condition = (self._run(loop.called(role)[0]) for role in ("body", "condition"))
        return body if "known_trip_count" in loop.rest else body.plus(condition)

    def _branch(self, x: Instruction) -> list[str]:
        """The branch of a conditional that counts."""
        names = x.called("branch_computations") or x.called("true_computation") + x.called("false_computation")
        number = self._branches.get(scope_of(x.rest, {*self._turns, *self._branches}))
        return [max(names, key=lambda name: self._run(name).known) if number is None else names[number]]

    def _call(self, x: Instruction, values: Mapping[str, Instruction]) -> Traffic:
        """The traffic of a call whose code is not in the program."""
        operands, results = [_bytes(values[name].shape) for name in x.operands], _bytes_of_each(x.shape)
        for name, moved in self._kernels.items():
            if name in x.rest:
                return Traffic(moved(operands, results), 1)
        target = _target(x)
        if target in FREE_CALLS:
            return Traffic()
        return Traffic(sum(operands) + sum(results), 1, frozenset(self._hidden(x)))

    def _hidden(self, x: Instruction) -> Iterator[str]:
        """The targets of unknown calls, including those in fusions."""
        if x.op == "custom-call" and not (target := _target(x)).startswith(HIDDEN) and target not in FREE_CALLS:
            yield target
        for name in x.called("calls"):
            for inner in self._bodies[name]:
                yield from self._hidden(inner)

    def _needs(
        self, x: Instruction, values: Mapping[str, Instruction], share: float, in_place: set[str] | frozenset[str]
    ) -> Iterator[_Needed]:
        """What an instruction needs of its operands for a share of its result; `in_place` lists the updates in
        place."""
        if called := x.called("calls"):
            for name, part in zip(x.operands, self._fused(called[0], share), strict=True):
                yield _Needed(name, part, piece=part < share)
            return
        for i, name in enumerate(x.operands):
            part, first = share, i == 0
            if x.op in _PIECES:
                part = share * _ratio(x, values[name]) if first else 1.0
            elif x.op in _UPDATES and not first:
                part = 1.0
            elif x.op in _UPDATES and x.name in in_place:
                part = _ratio(values[_update(x)], x) if self._combines(x) else 0.0
            elif x.op in _REPEATS:
                part = share * _ratio(x, values[name])
            elif x.op in _WHOLE:
                part = 1.0
            yield _Needed(name, min(part, 1.0), piece=first and x.op in _PIECES)

    def _fused(self, name: str, share: float) -> list[float]:
        """For each parameter of a fused computation, the share that is needed for a share of its result."""
        body = self._bodies[name]
        values, in_place = {x.name: x for x in body}, self._updates(name)[1]
        whole = {x.name: share for x in body if x.root}
        pieces: dict[str, float] = {}
        parameters: dict[int, float] = {}
        for x in reversed(body):
            needed = min(1.0, whole.get(x.name, 0.0) + pieces.get(x.name, 0.0))
            if x.op == "parameter":
                parameters[int(x.rest.partition(")")[0])] = needed
            elif needed:
                for operand, part, piece in self._needs(x, values, needed, in_place):
                    if piece:
                        pieces[operand] = pieces.get(operand, 0.0) + part
                    else:
                        whole[operand] = max(whole.get(operand, 0.0), part)
        return [parameters[i] for i in sorted(parameters)]

    def _updates(self, name: str) -> tuple[list[float], frozenset[str]]:
        """For each result of a fused computation, the share that is written, and the updates in place, whatever comes
        between them and a parameter."""
        values = {x.name: x for x in self._bodies[name]}
        root = next(x for x in values.values() if x.root)
        written, in_place = [], set()
        for leaf in root.operands if root.op == "tuple" else [root.name]:
            chain, x = [], values[leaf]
            while x.op in _UPDATES or x.op == "bitcast":
                chain += [x] if x.op in _UPDATES else []
                x = values[x.operands[0]]
            if stays := chain and x.op == "parameter":
                in_place |= {x.name for x in chain}
            written.append(min(1.0, sum(_ratio(values[_update(x)], x) for x in chain)) if stays else 1.0)
        return written, frozenset(in_place)

    def _written(self, x: Instruction, values: Mapping[str, Instruction]) -> float:
        results = _bytes_of_each(x.shape)
        if x.op in _UPDATES:
            return sum(results) * min(1.0, _ratio(values[_update(x)], x))
        if called := x.called("calls"):
            shares = self._updates(called[0])[0]
            if len(shares) == len(results):
                return sum(share * size for share, size in zip(shares, results, strict=True))
        return sum(results)

    def _combines(self, x: Instruction) -> bool:
        """Whether an update needs the old values, such as a scatter that adds."""
        inside = [self._bodies[name] for name in x.called("to_apply")] if x.op == "scatter" else []
        return any(not (y.op == "parameter" and y.rest.startswith("1)")) for body in inside for y in body if y.root)


def _started(x: Instruction, values: Mapping[str, Instruction]) -> Instruction:
    """The work that a "-start" instruction begins; its result holds its inputs, its outputs and more."""
    if not x.op.endswith("-start") or x.op == "all-reduce-start":
        return x
    arrays = [match[0] for match in ARRAY.finditer(x.shape)]
    taken = sum(len(ARRAY.findall(values[name].shape)) for name in x.operands)
    given = arrays[:1] if x.op == "copy-start" else [array for array in arrays[taken:] if "[]" not in array]
    return x._replace(op=x.op.removesuffix("-start"), shape=" ".join(given))


def _update(x: Instruction) -> str:
    """The name of the array that an update writes; for a scatter of several arrays, the first."""
    return x.operands[1 if x.op == "dynamic-update-slice" else len(x.operands) // 2 + 1]


def _target(x: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', x.rest)
    return match[1] if match else ""


def _ratio(part: Instruction, whole: Instruction) -> float:
    """The ratio of the numbers of elements."""
    part_, whole_ = (sum(array.elements for array in arrays(x.shape)) for x in (part, whole))
    return part_ / max(whole_, 1)


def _bytes(shape: str) -> int:
    return sum(_bytes_of_each(shape))


def _bytes_of_each(shape: str) -> list[int]:
    return [array.bytes for array in arrays(shape)]


@functools.lru_cache(maxsize=1 << 16)
def arrays(shape: str) -> Sequence[Array]:
    """The arrays of a result, in the order of the text.

    >>> arrays("(f32[3,5]{1,0}, bf16[10,64]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)S(1)}, s32[])")[1]
    Array(elements=640, bytes=4096)
    """
    return tuple(_array(*match) for match in ARRAY.findall(shape))


def _array(bits: str, shape: str, layout: str) -> Array:
    sizes = [int(size) for size in shape.split(",") if size]
    elements = math.prod(sizes)
    order, _, rest = layout.partition(":")
    tile, space = re.search(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
    if space and (tile or space[1] == "5"):
        return Array(elements, 0)
    if tile:  # the last axes in memory, rounded up to whole tiles
        held = [sizes[int(axis)] for axis in reversed(order.split(",")) if axis]
        for i, size in enumerate(reversed(tile[1].split(",")), start=1):
            if i <= len(held):
                held[-i] = -(-held[-i] // int(size)) * int(size)
        sizes = held
    return Array(elements, math.prod(sizes) * int(bits or 8) // 8)
