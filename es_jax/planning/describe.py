"""A plan in words, and as the JSON that `python -m es_jax.plan --json` prints."""

import math
from collections.abc import Iterator
from typing import Any

from es_jax.core.chips import GIB
from es_jax.core.mesh import GROUPS, MODEL
from es_jax.planning.hlo import Collective
from es_jax.planning.plan import Outcome, Plan
from es_jax.training.method import METHODS

_LINKS_SHOWN = 4  # kinds of collectives a program is told with; the rest are added up


def words(plan: Plan) -> str:
    """Several lines: what was compiled, a row a program, what it sends, the bound on an iteration, the verdict."""
    lines = [_heading(plan), ""]
    rows: list[tuple[str, ...]] = [
        ("program", "runs", "compile", "GiB a device, and what of", "GiB pinned", "TFLOP", "bound")
    ]
    rows += [_row(plan, outcome) for outcome in plan.programs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "Sent between devices, of one run of each program:"]
    lines += [f"  {outcome.name}: {_sent(outcome)}" for outcome in plan.programs]
    lines += ["", _bound(plan), verdict(plan)]
    return "\n".join(lines)


def fields(plan: Plan) -> dict[str, Any]:
    """The documented fields of --json; see `es_jax.plan`."""
    chip = plan.topology.chip
    return {
        "fits": plan.fits,
        "verdict": verdict(plan),
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "memory_bytes": chip.memory,
        "mesh": plan.mesh,
        "slots": plan.slots,
        "bound_seconds": plan.seconds,
        "compile_seconds": sum(outcome.seconds for outcome in plan.programs),
        "programs": {outcome.name: _program(plan, outcome) for outcome in plan.programs},
    }


def verdict(plan: Plan) -> str:
    """Fits, and with how much to spare; or by how much not, and what would help."""
    worst = max(plan.programs, key=lambda outcome: outcome.peak)
    memory = plan.topology.chip.memory
    if plan.fits:
        return f"fits: {worst.name} needs most, {_gib(worst.peak)} of {_gib(memory)} GiB a device"
    failed = [outcome for outcome in plan.programs if outcome.error and not outcome.peak]
    if failed:
        return f"does not fit: {failed[0].name} does not compile ({failed[0].error})"
    remedies = "; ".join(_remedies(plan, worst)) or "use more devices, or chips with more memory"
    return f"does not fit: {worst.name} needs {_gib(worst.peak)} of {_gib(memory)} GiB a device; {remedies}"


def _remedies(plan: Plan, worst: Outcome) -> Iterator[str]:
    """What would make room, with how much, by arithmetic alone: another plan must show it."""
    parts, groups, model = worst.parts, plan.mesh[GROUPS], plan.mesh[MODEL]
    if cache := parts.get("KV cache"):
        slots = plan.slots - math.ceil(plan.short * plan.slots / cache)
        if slots > 0:
            yield f"decode.slots={slots} frees {_gib(cache * (plan.slots - slots) / plan.slots)}"
    if (copy := parts.get("compute copy", 0)) and groups % 2 == 0:
        freed = (copy + parts.get("KV cache", 0)) / 2
        yield f"mesh.model={2 * model} with mesh.groups={groups // 2} frees about {_gib(freed)}"
    if plan.config.optim.anchor.penalty != "none" and (anchor := parts.get("anchor", 0)):
        yield f"optim.anchor.memory=pinned_host frees {_gib(anchor)} while members are evaluated"


def _heading(plan: Plan) -> str:
    topology, model, config = plan.topology, plan.config.model, plan.config
    size = METHODS[config.method].size.format(config=config)
    return (
        f"{size} of {model.source}, computed in {model.dtype}, weights in {model.param_dtype}, on "
        f"{topology.name}: {len(topology.devices)} devices of {_gib(topology.chip.memory)} GiB, "
        f"groups {plan.mesh[GROUPS]} × model {plan.mesh[MODEL]}, {plan.slots} slots"
    )


def _row(plan: Plan, outcome: Outcome) -> tuple[str, ...]:
    parts = " + ".join(f"{name} {_gib(size)}" for name, size in outcome.parts.items() if size >= GIB / 200)
    return (
        outcome.name,
        f"{outcome.times} ×" if outcome.times else "once",
        f"{outcome.seconds:.0f} s",
        f"{_gib(outcome.peak)} = {parts}" if outcome.peak else str(outcome.error),
        _gib(outcome.host),
        f"{outcome.work.flops / 1e12:.4g}",
        f"{outcome.work.seconds(plan.topology.chip):.3g} s",
    )


def _sent(outcome: Outcome) -> str:
    if not outcome.collectives:
        return "nothing"
    shown = [_kind(kind) for kind in outcome.collectives[:_LINKS_SHOWN]]
    rest = outcome.collectives[_LINKS_SHOWN:]
    if rest:
        shown.append(
            f"{len(rest)} smaller kind{'s' if len(rest) > 1 else ''}, {sum(kind.sent for kind in rest) / 1e6:.3g} MB"
        )
    total = sum(kind.sent for kind in outcome.collectives)
    return f"{total / 1e9:.4g} GB a device. " + "; ".join(shown)


def _kind(kind: Collective) -> str:
    groups = f"{kind.groups} groups of {kind.size}" if kind.groups > 1 else "all devices"
    return f"{kind.times} × {kind.op} of {kind.bytes / 1e6:.4g} MB over {' and '.join(kind.axes)} ({groups})"


def _bound(plan: Plan) -> str:
    return (
        f"An iteration takes at least {plan.seconds:.4g} s: a bound, not a measurement, with every completion at its "
        f"full length, the published peaks of the {plan.topology.chip.name}, and noise, scheduling and host left out."
    )


def _program(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    return {
        "peak_bytes": outcome.peak,
        "own_bytes": outcome.own,
        "host_bytes": outcome.host,
        "parts": outcome.parts,
        "collectives": [
            {
                "op": kind.op,
                "bytes": kind.bytes,
                "times": kind.times,
                "axes": list(kind.axes),
                "groups": kind.groups,
                "group_size": kind.size,
            }
            for kind in outcome.collectives
        ],
        "compile_seconds": round(outcome.seconds, 2),
        "runs": outcome.times,
        "flops": outcome.work.flops,
        "memory_traffic_bytes": outcome.work.memory,
        "sent_bytes": outcome.work.sent,
        "bound_seconds": outcome.work.seconds(plan.topology.chip),
        "error": outcome.error,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
