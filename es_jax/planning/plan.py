"""Compile a run's programs for a topology, and judge whether it fits; try meshes and slots until none can be faster."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from es_jax.core.chips import GIB
from es_jax.core.mesh import GROUPS, MODEL
from es_jax.models.config import TransformerConfig
from es_jax.planning.costs import Work
from es_jax.planning.hlo import Collective, collectives
from es_jax.planning.methods import programs_of
from es_jax.planning.programs import Program
from es_jax.planning.topology import Topology
from es_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What compiling one program showed. The fields are those of --json.

    Attributes:
      name: of the program.
      peak_bytes: of a device while it runs, with all that the run holds beside it.
      own_bytes: of these, the program's own.
      host_bytes: of pinned host memory, for one device.
      parts: what the peak is made of, in bytes of a device; the last is "rest".
      collectives: what it sends between devices.
      compile_seconds: compiling took.
      runs: how often an iteration runs it; 0 for "load".
      work: of one run of it on a device.
      error: why it did not compile.
    """

    name: str
    peak_bytes: int
    own_bytes: int
    host_bytes: int
    parts: dict[str, int]
    collectives: list[Collective]
    compile_seconds: float
    runs: int
    work: Work
    error: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology."""

    config: RunConfig
    topology: Topology
    mesh: dict[str, int]
    slots: int
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
    compiled: dict[Any, Any] | None = None,
) -> Plan:
    """Compile every program of the run.

    Args:
      config: of the run.
      model: the model's shape.
      topology: what to compile for.
      say: gets a line on each program when it is compiled.
      compiled: what earlier plans of the same model and topology compiled; it is used, and added to.

    Raises:
      ValueError: a mesh that the topology or the model does not allow.
    """
    compiled = {} if compiled is None else compiled
    programs, outcomes = programs_of(config, model, topology), []
    axes = {axis: programs.mesh.shape[axis] for axis in (GROUPS, MODEL)}
    slots = programs.evaluator.engine.slots
    for program in programs:
        key = (program.name, *axes.values(), slots if program.name in ("decode", "rollout") else None)
        if key not in compiled:
            compiled[key] = compile_program(program, axes)
            say(f"{program.name}: compiled in {compiled[key][0].compile_seconds:.0f} s")
        outcome, shardings = compiled[key]
        outcomes.append(outcome)
        if program.name == "perturb":
            if outcome.error:
                break  # where decode would find the members' weights is not known
            programs.place_copy(shardings)
    return Plan(programs.config, topology, axes, slots, tuple(outcomes))


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
    kinds = collectives(compiled.as_text(), axes, turns=program.turns) if compiled else []
    parts = {name: held.device for name, held in program.parts.items() if held.device}
    peak = own + sum(size for name, size in parts.items() if name not in program.own)
    outcome = Outcome(
        program.name, peak, own, sum(held.host for held in program.parts.values()),
        parts | {"rest": peak - sum(parts.values())}, kinds, seconds, program.times,
        dataclasses.replace(program.work, sent=program.work.sent + sum(kind.sent for kind in kinds)),
        error and error.splitlines()[0],
    )  # fmt: skip
    return outcome, compiled and compiled.output_shardings


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


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config with a mesh and a slot count, and what is known of it before anything is compiled.

    Attributes:
      seconds: the bound on an iteration without what is sent between devices.
      least: bytes of a device that it needs at least.
    """

    config: RunConfig
    seconds: float
    least: int


def search(
    config: RunConfig, model: TransformerConfig, topology: Topology, *, say: Callable[[str], None] = lambda line: None
) -> Plan:
    """The plan with the lowest bound on an iteration's time among those that fit.

    All meshes of the devices and 1, 1/2, 1/4, … of a step's prompts as slots are candidates, the most promising first.
    Where nothing fits, the plan that is nearest to fitting.

    Raises:
      ValueError: no mesh suits the model and the topology.
    """
    compiled: dict = {}
    plans: list[Plan] = []
    best: Plan | None = None
    for candidate in candidates(config, model, topology):
        mesh, slots = candidate.config.mesh, candidate.config.decode.slots
        if best is not None and candidate.seconds >= best.seconds:
            break
        report = lambda line, mesh=mesh, slots=slots: say(  # noqa: E731
            f"groups {mesh.groups} × model {mesh.model}, {slots} slots: {line}"
        )
        if candidate.least > topology.chip.memory:
            report(f"needs more than {candidate.least / GIB:.2f} GiB, not compiled")
            continue
        plan = make_plan(candidate.config, model, topology, say=report, compiled=compiled)
        report(f"{'fits' if plan.fits else 'does not fit'}, at least {plan.seconds:.4g} s an iteration")
        plans.append(plan)
        best = min((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds, default=None)
    if not plans:
        raise ValueError(f"no mesh of {topology.name} has room for a member of this model: take chips with more memory")
    return best or min(plans, key=lambda plan: plan.short)


def candidates(config: RunConfig, model: TransformerConfig, topology: Topology) -> list[Candidate]:
    """All that suit, the lowest bound first; of equal ones that which cuts members over fewer devices."""
    results = []
    for variant in _variants(config, model, len(topology.devices)):
        programs = list(programs_of(variant, model, topology))
        seconds = sum(program.times * program.work.seconds(topology.chip) for program in programs)
        least = max(sum(part.device for part in program.parts.values()) for program in programs)
        results.append(Candidate(variant, seconds, least))
    return sorted(results, key=lambda one: (one.seconds, one.config.mesh.model))


def _variants(config: RunConfig, model: TransformerConfig, devices: int) -> Iterator[RunConfig]:
    prompts = config.task.prompts_per_step or config.task.train_size
    shares = (model.heads, model.kv_heads, model.mlp_dim, model.vocab_size, devices)
    for width in (2**i for i in range(devices.bit_length())):
        if any(size % width for size in shares):
            continue
        mesh = dataclasses.replace(config.mesh, groups=devices // width, model=width)
        for batches in (2**i for i in range(prompts.bit_length())):
            decode = dataclasses.replace(config.decode, slots=-(-prompts // batches))
            yield dataclasses.replace(config, mesh=mesh, decode=decode)
