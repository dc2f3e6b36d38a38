"""Meshes and slot counts, tried until no other can be faster than the best that fits."""

import dataclasses
from collections.abc import Callable, Iterator

from es_jax.core.chunked_map import ceil_div
from es_jax.models.config import TransformerConfig
from es_jax.planning.plan import Plan, make_plan
from es_jax.planning.programs import programs_of
from es_jax.planning.topology import Topology
from es_jax.training.config import RunConfig


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
) -> tuple[Plan, list[Plan]]:
    """The plan with the lowest bound on an iteration's time among those that fit, and all that were compiled.

    All meshes of the devices and 1, 1/2, 1/4, … of a step's prompts as slots are candidates, the most promising first.
    Where nothing fits, the plan that is nearest to fitting.

    Raises:
      ValueError: no mesh suits the model and the topology.
    """
    compiled: dict = {}
    tried: list[Plan] = []
    best: Plan | None = None
    for candidate in candidates(config, model, topology):
        mesh, decode = candidate.config.mesh, candidate.config.decode
        name = f"groups {mesh.groups} × model {mesh.model}, {decode.slots} slots"
        if best is not None and candidate.seconds >= best.seconds:
            break
        if candidate.least > topology.chip.memory:
            say(f"{name}: needs more than {candidate.least / 2**30:.2f} GiB, not compiled")
            continue
        told = lambda line, name=name: say(f"{name}: {line}")  # noqa: E731
        plan = make_plan(candidate.config, model, topology, say=told, compiled=compiled)
        say(f"{name}: {'fits' if plan.fits else 'does not fit'}, at least {plan.seconds:.4g} s an iteration")
        tried.append(plan)
        if plan.fits and (best is None or plan.seconds < best.seconds):
            best = plan
    if not tried:
        raise ValueError(f"no mesh of {topology.name} has room for a member of this model: take chips with more memory")
    return best or min(tried, key=lambda plan: plan.short), tried


def candidates(config: RunConfig, model: TransformerConfig, topology: Topology) -> list[Candidate]:
    """All that suit, the lowest bound first; of equal ones that which cuts members over fewer devices."""
    found = [_candidate(one, model, topology) for one in _variants(config, model, len(topology.devices))]
    return sorted(found, key=lambda one: (one.seconds, one.config.mesh.model))


def _variants(config: RunConfig, model: TransformerConfig, devices: int) -> Iterator[RunConfig]:
    prompts = config.task.prompts_per_step or config.task.train_size
    shares = (model.heads, model.kv_heads, model.mlp_dim, model.vocab_size, devices)
    for width in (2**i for i in range(devices.bit_length())):
        if any(size % width for size in shares):
            continue
        mesh = dataclasses.replace(config.mesh, groups=devices // width, model=width)
        for batches in (2**i for i in range(prompts.bit_length())):
            decode = dataclasses.replace(config.decode, slots=ceil_div(prompts, batches))
            yield dataclasses.replace(config, mesh=mesh, decode=decode)


def _candidate(config: RunConfig, model: TransformerConfig, topology: Topology) -> Candidate:
    programs = programs_of(config, model, topology)
    parts = [[part.device for part in program.parts.values()] for program in programs]
    seconds = sum(program.times * program.work.seconds(topology.chip) for program in programs)
    return Candidate(config, seconds, max(map(sum, parts)))
