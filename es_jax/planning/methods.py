"""The programs of a run, by its method."""

import dataclasses

from es_jax.models.config import TransformerConfig
from es_jax.planning.grpo_programs import PolicyPrograms
from es_jax.planning.programs import Programs
from es_jax.planning.topology import Topology
from es_jax.training.config import RunConfig
from es_jax.training.state import mesh_of

PROGRAMS = {"es": Programs, "grpo": PolicyPrograms}


def programs_of(config: RunConfig, model: TransformerConfig, topology: Topology) -> Programs:
    """A run's programs, on the mesh that it asks for; model.dtype "auto" is bfloat16, as on any accelerator.

    Raises:
      ValueError: a mesh that the topology or the model does not allow.
    """
    if config.model.dtype == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    devices, memory = list(topology.devices), topology.chip.memory
    return PROGRAMS[config.method](config, model, mesh_of(config, model, devices=devices, memory=memory))
