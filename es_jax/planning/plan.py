"""Compile a run's programs for a topology, and judge whether it fits."""

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
from es_jax.planning.programs import Program, programs_of
from es_jax.planning.topology import Topology
from es_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What compiling one program showed.

    Attributes:
      name, times: of the program.
      peak: bytes of a device while it runs, with all that the run holds beside it.
      own: of these, the program's own.
      host: bytes of pinned host memory, for one device.
      parts: what the peak is made of, in bytes of a device; the last is "rest".
      collectives: what it sends between devices.
      seconds: compiling took.
      work: of one run of it on a device.
      error: why it did not compile.
    """

    name: str
    times: int
    peak: int
    own: int
    host: int
    parts: dict[str, int]
    collectives: list[Collective]
    seconds: float
    work: Work
    error: str | None = None


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
        return max(outcome.peak for outcome in self.programs) - self.topology.chip.memory

    @property
    def fits(self) -> bool:
        return self.short <= 0 and not any(outcome.error for outcome in self.programs)

    @property
    def seconds(self) -> float:
        """The bound on an iteration's time."""
        return sum(outcome.times * outcome.work.seconds(self.topology.chip) for outcome in self.programs)


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
      say: told of each program when it is compiled.
      compiled: what earlier plans of the same model and topology compiled; it is used, and added to.

    Raises:
      ValueError: a mesh that the topology or the model does not allow.
    """
    programs, done = programs_of(config, model, topology), {} if compiled is None else compiled
    axes = {GROUPS: programs.mesh.shape[GROUPS], MODEL: programs.mesh.shape[MODEL]}
    outcomes = []
    for program in programs:
        slots = programs.evaluator.engine.slots if program.name in ("decode", "rollout") else None
        key = (program.name, *axes.values(), slots)
        if key not in done:
            done[key] = compile_program(program, axes)
            say(f"{program.name}: compiled in {done[key][0].seconds:.0f} s")
        outcome, shardings = done[key]
        outcomes.append(outcome)
        if program.name == "perturb":
            if outcome.error:
                break  # nobody knows what decode would be given
            programs.place_copy(shardings)
    return Plan(programs.config, topology, axes, programs.evaluator.engine.slots, tuple(outcomes))


def compile_program(program: Program, axes: dict[str, int]) -> tuple[Outcome, Any]:
    """What came of it, and where its results are (None where it did not compile)."""
    began = time.monotonic()
    try:
        with _uncached():
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(program, str(error), time.monotonic() - began), None
    seconds = time.monotonic() - began
    sent = collectives(compiled.as_text(), axes, turns=program.turns)
    own = _peak(compiled.memory_analysis())
    work = program.work + Work(sent=sum(kind.sent for kind in sent))
    return _outcome(program, own, sent, seconds, work), compiled.output_shardings


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


def _outcome(program: Program, own: int, sent: list[Collective], seconds: float, work: Work) -> Outcome:
    beside = sum(held.device for name, held in program.parts.items() if name not in program.own)
    peak = own + beside
    parts = {name: held.device for name, held in program.parts.items() if held.device}
    parts["rest"] = peak - sum(parts.values())
    host = sum(held.host for held in program.parts.values())
    return Outcome(program.name, program.times, peak, own, host, parts, sent, seconds, work)


def _too_large(program: Program, message: str, seconds: float) -> Outcome:
    """The compiler's own figure of what the program would need."""
    found = re.search(r"Used ([\d.]+)([KMG]) of|\(([\d.]+)([KMG])\) exceeds", message)
    size = float(found[1] or found[3]) * {"K": 2**10, "M": 2**20, "G": GIB}[found[2] or found[4]] if found else 0
    outcome = _outcome(program, int(size), [], seconds, program.work)
    return dataclasses.replace(outcome, error=message.splitlines()[0])
