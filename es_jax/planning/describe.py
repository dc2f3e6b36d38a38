"""A plan in words, and as the JSON that `python -m es_jax.plan --json` prints."""

import math
from collections.abc import Iterator
from typing import Any

from es_jax.core.chips import GIB
from es_jax.core.mesh import GROUPS, MODEL
from es_jax.planning.hlo import Collective
from es_jax.planning.plan import Outcome, Plan

_NAMED = 4  # kinds of collectives of a program that have words of their own; the rest are added up


def words(plan: Plan) -> str:
    """Several lines: what was compiled, a row a program, what it sends, the bound on an iteration, the verdict."""
    config, chip, devices = plan.config, plan.topology.chip, len(plan.topology.devices)
    size = f"N = {config.es.population}" if config.method == "es" else f"{config.grpo.rollouts} rollouts a prompt"
    cells: list[tuple[str, ...]] = [
        ("program", "runs", "compile", "GiB a device, and what of", "GiB pinned", "TFLOP", "bound")
    ]
    for outcome in plan.programs:
        parts = " + ".join(f"{name} {_gib(size)}" for name, size in outcome.parts.items() if size >= GIB / 200)
        cells.append((
            outcome.name,
            f"{outcome.runs} ×" if outcome.runs else "once",
            f"{outcome.compile_seconds:.0f} s",
            f"{_gib(outcome.peak_bytes)} = {parts}" if outcome.peak_bytes else str(outcome.error),
            _gib(outcome.host_bytes),
            f"{outcome.work.flops / 1e12:.4g}",
            f"{outcome.work.seconds(chip):.3g} s",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join([
        f"{config.method.upper()} with {size} of {config.model.source}, computed in {config.model.dtype}, weights in "
        f"{config.model.param_dtype}, on {plan.topology.name}: {devices} devices of {_gib(chip.memory)} GiB, "
        f"groups {plan.mesh[GROUPS]} × model {plan.mesh[MODEL]}, {plan.slots} slots",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells),
        "",
        "Sent between devices, of one run of each program:",
        *(f"  {outcome.name}: {_sent(outcome.collectives)}" for outcome in plan.programs),
        "",
        f"An iteration takes at least {plan.seconds:.4g} s: a bound, not a measurement, with every completion at its "
        f"full length, the published peaks of the {chip.name}, and noise, scheduling and host left out.",
        verdict(plan),
    ])  # fmt: skip


def fields(plan: Plan) -> dict[str, Any]:
    """The documented fields of --json; see `es_jax.plan`."""
    return {
        "fits": plan.fits,
        "verdict": verdict(plan),
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "memory_bytes": plan.topology.chip.memory,
        "mesh": plan.mesh,
        "slots": plan.slots,
        "bound_seconds": plan.seconds,
        "compile_seconds": sum(outcome.compile_seconds for outcome in plan.programs),
        "programs": {outcome.name: _program(plan, outcome) for outcome in plan.programs},
    }


def verdict(plan: Plan) -> str:
    """Fits, and with how much to spare; or by how much not, and what would help."""
    worst = max(plan.programs, key=lambda outcome: outcome.peak_bytes)
    of = f"{_gib(worst.peak_bytes)} of {_gib(plan.topology.chip.memory)} GiB a device"
    if plan.fits:
        return f"fits: {worst.name} needs most, {of}"
    for outcome in plan.programs:
        if outcome.error and not outcome.peak_bytes:
            return f"does not fit: {outcome.name} does not compile ({outcome.error})"
    remedies = "; ".join(_remedies(plan, worst)) or "use more devices, or chips with more memory"
    return f"does not fit: {worst.name} needs {of}; {remedies}"


def _remedies(plan: Plan, worst: Outcome) -> Iterator[str]:
    """What would make room, with how much, by arithmetic alone: another plan must show it."""
    cache, copy, anchor = (worst.parts.get(name, 0) for name in ("KV cache", "compute copy", "anchor"))
    groups, model = plan.mesh[GROUPS], plan.mesh[MODEL]
    if cache:
        slots = plan.slots - math.ceil(plan.short * plan.slots / cache)
        if slots > 0:
            yield f"decode.slots={slots} frees {_gib(cache * (plan.slots - slots) / plan.slots)}"
    if copy and groups % 2 == 0:
        yield f"mesh.model={2 * model} with mesh.groups={groups // 2} frees about {_gib((copy + cache) / 2)}"
    if anchor and plan.config.optim.anchor.penalty != "none":
        yield f"optim.anchor.memory=pinned_host frees {_gib(anchor)} while members are evaluated"


def _sent(kinds: list[Collective]) -> str:
    if not kinds:
        return "nothing"
    parts = []
    for kind in kinds[:_NAMED]:
        groups = f"{kind.groups} groups of {kind.group_size}" if kind.groups > 1 else "all devices"
        axes = " and ".join(kind.axes)
        parts.append(f"{kind.times} × {kind.op} of {kind.bytes / 1e6:.4g} MB over {axes} ({groups})")
    if rest := kinds[_NAMED:]:
        megabytes = sum(kind.sent for kind in rest) / 1e6
        parts.append(f"{len(rest)} smaller kind{'s' if len(rest) > 1 else ''}, {megabytes:.3g} MB")
    return f"{sum(kind.sent for kind in kinds) / 1e9:.4g} GB a device. " + "; ".join(parts)


def _program(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    fields = vars(outcome) | {
        "collectives": [vars(kind) | {"axes": list(kind.axes)} for kind in outcome.collectives],
        "compile_seconds": round(outcome.compile_seconds, 2),
        "flops": outcome.work.flops,
        "memory_traffic_bytes": float(outcome.work.memory),
        "sent_bytes": outcome.work.sent,
        "bound_seconds": outcome.work.seconds(plan.topology.chip),
    }
    return {name: value for name, value in fields.items() if name not in ("name", "work")}


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
