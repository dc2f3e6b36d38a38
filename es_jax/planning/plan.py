"""Compile a run's programs for a topology, judge whether it fits, and say so in words and as JSON.

`make_plan` compiles in a child process (compiler.py, child.py), `plan_here` in this one. `search` tries meshes, members
at once and slot counts until no other can be faster than the best that fits.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import re
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from es_jax.core.chips import GIB
from es_jax.core.chunked_map import ceil_div
from es_jax.core.mesh import GROUPS, MODEL
from es_jax.core.text_table import aligned
from es_jax.models.config import TransformerConfig
from es_jax.planning.compiler import Compiler, CompilerEnded
from es_jax.planning.costs import Work
from es_jax.planning.hlo import Collective, collectives
from es_jax.planning.programs import Counted, Program, placed, programs_of
from es_jax.planning.topology import Topology
from es_jax.planning.traffic import Traffic, TrafficCounter
from es_jax.training.config import RunConfig, freeze
from es_jax.training.method import METHODS
from es_jax.training.sizes import prompts_of_member

_NAMED = 4  # kinds of collectives of a program that have words of their own; the rest are added up


class Moved(NamedTuple):
    """What a part of a program reads and writes in a device's memory, and must at least."""

    traffic: Traffic | None  # None where the program did not compile, or has no such loop
    least: float

    @property
    def ratio(self) -> float | None:
        known = self.traffic.bytes if self.traffic else None
        return known and known / self.least


class Outcome(NamedTuple):
    """What compiling one program showed. The fields are those of --json, see `es_jax.plan`."""

    name: str
    peak_bytes: int
    own_bytes: int
    host_bytes: int
    parts: dict[str, int]  # what the peak is made of; the last is "rest"
    collectives: list[Collective]
    compile_seconds: float
    runs: int
    work: Work  # of one run on a device
    error: str | None
    moved: dict[str, Moved]  # by the name of the part, as `Program.counted`


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology."""

    config: RunConfig
    topology: Topology
    mesh: dict[str, int]
    slots: int
    members_at_once: int
    programs: tuple[Outcome, ...]

    @property
    def short(self) -> int:
        """Bytes of a device that are missing; negative where there is room."""
        return max(outcome.peak_bytes for outcome in self.programs) - self.topology.chip.memory

    @property
    def fits(self) -> bool:
        return self.short <= 0 and not any(outcome.error for outcome in self.programs)

    @property
    def seconds(self) -> float:
        """The bound on an iteration's time."""
        return sum(outcome.runs * outcome.work.seconds(self.topology.chip) for outcome in self.programs)


def make_plan(
    config: RunConfig,
    model: TransformerConfig,
    topology: Topology,
    *,
    say: Callable[[str], None] = lambda line: None,
    only: Set[str] | None = None,
    compiler: Compiler | None = None,
) -> Plan:
    """Compile every program of the run, for a model of that shape, in a child process.

    Args:
      say: gets a line on each program when it is compiled.
      only: the names of the programs to compile; what others need of one that is left out is not known.
      compiler: the child, which uses what it compiled for earlier plans of the same model and topology; None starts one
        for this plan.

    Raises:
      ValueError: a mesh that the topology or the model does not allow.
      CompilerEnded: the compiler ended without an answer; the text names its version and what to do.
    """
    with contextlib.nullcontext(compiler) if compiler else Compiler() as child:
        answer = child.ask(
            {
                "config": dataclasses.asdict(config),
                "model": dataclasses.asdict(model),
                "chip": dataclasses.asdict(topology.chip),
                "only": only,
            },
            topology,
            say,
        )
    outcomes = tuple(map(_outcome, answer.pop("programs")))
    return Plan(freeze(answer.pop("config"), begun=True), topology, programs=outcomes, **answer)


def _outcome(values: Sequence[Any]) -> Outcome:
    """An outcome that JSON made a list of lists."""
    outcome = Outcome(*values)
    kinds = [Collective(*kind)._replace(axes=tuple(kind[3])) for kind in outcome.collectives]
    moved = {
        name: Moved(traffic and Traffic(*traffic[:2], frozenset(traffic[2])), least)
        for name, (traffic, least) in outcome.moved.items()
    }
    return outcome._replace(collectives=kinds, work=Work(*outcome.work), moved=moved)


def plan_here(
    config: RunConfig,
    model: TransformerConfig,
    topology: Topology,
    *,
    say: Callable[[str], None] = lambda line: None,
    only: Set[str] | None = None,
    compiled: dict[Any, Any] | None = None,
    begin: Callable[[str], None] = lambda name: None,
) -> Plan:
    """As `make_plan`, in this process, which ends where the compiler does.

    Args:
      compiled: what earlier plans of the same model and topology compiled; it is used, and added to.
      begin: gets a program's name before it is compiled.
    """
    compiled = {} if compiled is None else compiled
    programs, outcomes = programs_of(config, model, topology), []
    axes = {axis: programs.mesh.shape[axis] for axis in (GROUPS, MODEL)}
    slots, at_once = programs.evaluator.engine.slots, programs.evaluator.at_once
    sizes = {"perturb": (at_once,), "decode": (at_once, slots), "rollout": (slots,)}
    for program in programs:
        if only is not None and program.name not in only:
            continue
        key = (program.name, *axes.values(), *sizes.get(program.name, ()))
        if key not in compiled:
            begin(program.name)
            compiled[key] = compile_program(program, axes)
            say(f"{program.name}: compiled in {compiled[key][0].compile_seconds:.0f} s")
        outcome, shardings = compiled[key]
        outcomes.append(outcome)
        if program.name in programs.weights:
            if outcome.error:
                break  # where decode would find the members' weights is not known
            programs.weights[program.name] = placed(programs.weights[program.name], shardings)
    return Plan(programs.config, topology, axes, slots, at_once, tuple(outcomes))


def compile_program(program: Program, axes: dict[str, int]) -> tuple[Outcome, Any]:
    """What came of it, and where its results are (None where it did not compile)."""
    began = time.monotonic()
    compiled, error = None, None
    try:
        with _uncached():
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as failure:
        if "RESOURCE_EXHAUSTED" not in (error := str(failure)):
            raise
    seconds = time.monotonic() - began
    own = _peak(compiled.memory_analysis()) if compiled else _needed(str(error))
    text = compiled.as_text() if compiled else ""
    kinds = collectives(text, axes, turns=program.turns) if compiled else []
    parts = {name: part.device for name, part in program.parts.items() if part.device}
    peak = own + sum(size for name, size in parts.items() if name not in program.own)
    outcome = Outcome(
        program.name, peak, own, sum(part.host for part in program.parts.values()),
        parts | {"rest": peak - sum(parts.values())}, kinds, seconds, program.times,
        program.work._replace(sent=program.work.sent + sum(kind.sent for kind in kinds)),
        error and error.splitlines()[0],
        {name: Moved(_traffic(text, program, part), part.least) for name, part in program.counted.items()},
    )  # fmt: skip
    return outcome, compiled and compiled.output_shardings


def _traffic(text: str, program: Program, part: Counted) -> Traffic | None:
    """Of a part of a program whose compiled text that is; "" where it did not compile."""
    if not text:
        return None
    turns = {**program.turns, **part.turns}
    counter = TrafficCounter(text, turns=turns, branches=part.branches, kernels=part.kernels)
    return counter.program() if part.scope is None else counter.turn(part.scope)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without the compilation cache: it takes programs for absent devices, and then cannot read them."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _peak(stats: Any) -> int:
    """Bytes of a device, without the pinned host buffers that the compiler counts among them."""
    host = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes
    if stats.peak_memory_in_bytes:
        return stats.peak_memory_in_bytes - host
    passed = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return passed + stats.temp_size_in_bytes


def _needed(error: str) -> int:
    """The compiler's own figure of what a program that is too large would need; 0 where it gives none."""
    match = re.search(r"Used ([\d.]+)([KMG]) of|\(([\d.]+)([KMG])\) exceeds", error)
    number, unit = filter(None, match.groups()) if match else ("0", "K")
    return int(float(number) * {"K": 2**10, "M": 2**20, "G": GIB}[unit])


class Candidate(NamedTuple):
    """A config with a mesh, members at once and a slot count, and what is known of it before anything is compiled."""

    config: RunConfig
    seconds: float  # the bound on an iteration, without what is sent between devices
    least: int  # bytes of a device that it needs


def search(config: RunConfig, model: TransformerConfig, topology: Topology, *, say: Callable[[str], None]) -> Plan:
    """The plan with the lowest bound on an iteration's time among those that fit, else the one nearest to fitting.

    All meshes of the devices, 1, 1/2, 1/4, … of a member's prompts as slots and, where members share their weights, 1,
    2, 4, … members at once are candidates, the most promising first.

    A candidate with which the compiler ends without an answer is told, and left out.

    Raises:
      ValueError: no mesh suits the model and the topology.
      CompilerEnded: the compiler had no answer for any candidate.
    """
    with Compiler() as compiler:
        return _search(config, model, topology, compiler, say)


def _search(
    config: RunConfig, model: TransformerConfig, topology: Topology, compiler: Compiler, say: Callable[[str], None]
) -> Plan:
    plans: list[Plan] = []
    unanswered: CompilerEnded | None = None
    for variant, seconds, least in candidates(config, model, topology):
        if any(plan.fits and plan.seconds <= seconds for plan in plans):
            break
        name = f"groups {variant.mesh.groups} × model {variant.mesh.model}, {variant.decode.slots} slots"
        if variant.es.noise == "low_rank":
            name += f", {variant.decode.members_at_once} at once"
        report = lambda line, name=name: say(f"{name}: {line}")  # noqa: E731
        if least > topology.chip.memory:
            report(f"needs more than {_gib(least)} GiB, not compiled")
            continue
        try:
            plan = make_plan(variant, model, topology, say=report, compiler=compiler)
        except CompilerEnded as error:
            report(str(error))
            unanswered = error
            continue
        report(f"{'fits' if plan.fits else 'does not fit'}, at least {plan.seconds:.4g} s an iteration")
        plans.append(plan)
    if unanswered and not plans:
        raise unanswered
    if not plans:
        raise ValueError(f"no mesh of {topology.name} has room for a member of this model: take chips with more memory")
    return min(plans, key=lambda plan: (not plan.fits, plan.seconds if plan.fits else plan.short))


def candidates(config: RunConfig, model: TransformerConfig, topology: Topology) -> list[Candidate]:
    """All that suit, the lowest bound first; of equal ones that which cuts members over fewer devices."""
    prompts, devices = prompts_of_member(config), len(topology.devices)
    shares, results = (model.heads, model.kv_heads, model.mlp_dim, model.vocab_size, devices), []
    powers = ([2**i for i in range(number.bit_length())] for number in (devices, prompts))
    share = config.es.population if config.record.perturbs and config.es.noise == "low_rank" else 0
    at_once = [2**i for i in range(share.bit_length())] or [config.decode.members_at_once]
    for width, batches, number in itertools.product(*powers, at_once):
        groups = devices // width
        if any(size % width for size in shares) or (share and number > 1 and number > share / groups):
            continue
        mesh = dataclasses.replace(config.mesh, groups=groups, model=width)
        decode = dataclasses.replace(config.decode, slots=ceil_div(prompts, batches), members_at_once=number)
        variant = dataclasses.replace(config, mesh=mesh, decode=decode)
        programs = list(programs_of(variant, model, topology))
        seconds = sum(program.times * program.work.seconds(topology.chip) for program in programs)
        least = max(sum(part.device for part in program.parts.values()) for program in programs)
        results.append(Candidate(variant, seconds, least))
    return sorted(results, key=lambda candidate: (candidate.seconds, candidate.config.mesh.model))


def words(plan: Plan) -> str:
    """Several lines: what was compiled, a row a program, what it sends, the bound on an iteration, the verdict."""
    config, chip, devices = plan.config, plan.topology.chip, len(plan.topology.devices)
    size = METHODS[config.method].size.format(config=config)
    cells = [("program", "runs", "compile", "GiB a device, and what of", "GiB pinned", "TFLOP", "bound")]
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
    return "\n".join([
        f"{size} of {config.model.source}, computed in {config.model.dtype}, weights in "
        f"{config.model.param_dtype}, on {plan.topology.name}: {devices} devices of {_gib(chip.memory)} GiB, "
        f"groups {plan.mesh[GROUPS]} × model {plan.mesh[MODEL]}, {_lanes(plan)}",
        "",
        *aligned(cells),
        "",
        "Sent between devices, of one run of each program:",
        *(f"  {outcome.name}: {_sent(outcome.collectives)}" for outcome in plan.programs),
        "",
        "Read and written in a device's memory, counted kernel by kernel:",
        *(f"  {line}" for outcome in plan.programs for line in _read(outcome)),
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
        "members_at_once": plan.members_at_once,
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
    groups, model, at_once = plan.mesh[GROUPS], plan.mesh[MODEL], plan.members_at_once
    if at_once > 1 and worst.name in ("perturb", "decode"):
        all_have = {"parameters", "anchor", "moments"} | ({"compute copy"} if "pairs" in worst.parts else set())
        lanes = sum(size for name, size in worst.parts.items() if name not in all_have)  # nearly all grows with them
        fewer, share = at_once - math.ceil(plan.short * at_once / lanes), ceil_div(plan.config.es.population, groups)
        if fewer > 0:
            fewer = ceil_div(share, ceil_div(share, fewer))  # of as many rounds
            yield f"decode.members_at_once={fewer} frees about {_gib(lanes * (at_once - fewer) / at_once)}"
    if cache:
        slots = plan.slots - math.ceil(plan.short * plan.slots / cache)
        if slots > 0:
            yield f"decode.slots={slots} frees {_gib(cache * (plan.slots - slots) / plan.slots)}"
    if copy and groups % 2 == 0:
        yield f"mesh.model={2 * model} with mesh.groups={groups // 2} frees about {_gib((copy + cache) / 2)}"
    if anchor and plan.config.optim.anchor.penalty != "none":
        yield f"optim.anchor.memory=pinned_host frees {_gib(anchor)} while members are evaluated"


def _lanes(plan: Plan) -> str:
    """What a group decodes at once."""
    config, slots = plan.config, f"{plan.slots} slot{'s' if plan.slots > 1 else ''}"
    if not config.record.perturbs:
        return slots
    members = f"{plan.members_at_once} member{'s' if plan.members_at_once > 1 else ''} at once"
    few = config.es.prompts_per_member
    of = f", {few} of {config.task.prompts_per_step or config.task.train_size} prompts each" if few else ""
    return f"{slots}, {members}{of}"


def _sent(kinds: list[Collective]) -> str:
    if not kinds:
        return "nothing"
    parts = []
    for kind in kinds[:_NAMED]:
        groups = f"{kind.groups} groups of {kind.group_size}" if kind.groups > 1 else "all devices"
        exchange = f"{kind.times} × {kind.op} of {kind.bytes / 1e6:.4g} MB"
        parts.append(f"{exchange} over {' and '.join(kind.axes)} ({groups})")
    if rest := kinds[_NAMED:]:
        megabytes = sum(kind.sent for kind in rest) / 1e6
        parts.append(f"{len(rest)} smaller kind{'s' if len(rest) > 1 else ''}, {megabytes:.3g} MB")
    return f"{sum(kind.sent for kind in kinds) / 1e9:.4g} GB a device. " + "; ".join(parts)


def _read(outcome: Outcome) -> Iterator[str]:
    """A line a part of a program."""
    for name, part in outcome.moved.items():
        what = {
            "": "",
            "step": ", a step of all slots at all places",
            "even_step": ", a step of all slots, their lengths spread evenly",
            "chunk": ", a chunk beside its steps",
        }
        least, traffic = f"{part.least / 1e9:.4g} GB at least", part.traffic
        if traffic is None:
            figures = f"not known, {least}"
        elif traffic.unknown:
            figures = f"not known, for it calls {', '.join(sorted(traffic.unknown))}; {least}"
        else:
            figures = f"{traffic.known / 1e9:.4g} GB, {part.ratio:.2f} × {least}; {round(traffic.kernels)} kernels"
        yield f"{outcome.name}{what.get(name, f', a {name}')}: {figures}"


def _program(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    fields = outcome._asdict() | {
        "collectives": [kind._asdict() | {"axes": list(kind.axes)} for kind in outcome.collectives],
        "compile_seconds": round(outcome.compile_seconds, 2),
        "flops": outcome.work.flops,
        "memory_traffic_bytes": float(outcome.work.memory),
        "sent_bytes": outcome.work.sent,
        "bound_seconds": outcome.work.seconds(plan.topology.chip),
    }
    moved = (_moved(part, f"{name}_" if name else "") for name, part in outcome.moved.items())
    kept = {name: value for name, value in fields.items() if name not in ("name", "work", "moved")}
    return functools.reduce(operator.or_, moved, kept)


def _moved(part: Moved, prefix: str) -> dict[str, Any]:
    traffic = part.traffic or Traffic()
    known = traffic.bytes if part.traffic else None
    return {
        f"{prefix}bytes": None if known is None else round(known),
        f"{prefix}bytes_least": round(part.least),
        f"{prefix}ratio": part.ratio,
        f"{prefix}kernels": round(traffic.kernels) if part.traffic else None,
        f"{prefix}unknown_calls": sorted(traffic.unknown),
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
