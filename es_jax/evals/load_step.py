"""The model of any step of a run, in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from es_jax.core import processes
from es_jax.rundir.places import MODELS
from es_jax.rundir.seed_log import steps_done
from es_jax.scoring.heldout import cast
from es_jax.training.config import read_config
from es_jax.training.config_groups import MeshConfig
from es_jax.training.start import outline_of
from es_jax.training.state import base_config, compute_dtype, mesh_of
from es_jax.training.weights_at import weights_at
from es_jax.weights.chat_template import set_date
from es_jax.weights.model import Model


def load_step(workdir: str | Path, step: int | None = None, *, mesh: Mesh | None = None) -> Model:
    """The model of a run's step, for `es_jax.complete` and `es_jax.perplexity`.

    Its weights are read from the step's checkpoint if there is one, otherwise replayed from the seed log, and are in
    the dtype that the run computes in (model.dtype): a greedy completion is what an evaluation of that step saw. Its
    chat template sees the run's day.

    Args:
      workdir: a run's directory; nothing in it is changed.
      step: 0 (the base model) to the last finished one; the last by default.
      mesh: where the weights are rebuilt and stay; by default they are rebuilt on all devices, and put on the first one
        where that has room for them twice.

    Raises:
      OSError: no run in the directory, or its base model is gone.
      ValueError: a step that the run does not have, one of a GRPO run without a checkpoint, or another base model than
        the run's.
    """
    workdir = Path(workdir)
    config, last = read_config(workdir, needs=MODELS), steps_done(workdir)
    step = last if step is None else step
    if not 0 <= step <= last:
        raise ValueError(f"step is {step}, but {workdir} holds steps 0 to {last}")
    model = outline_of(workdir)
    set_date(model.tokenizer, config.model.template_date)
    everywhere = mesh or mesh_of(dataclasses.replace(config, mesh=MeshConfig()), base_config(config))
    ((_, params),) = weights_at(workdir, [step], mesh=everywhere)
    params = cast(params, compute_dtype(config))
    return dataclasses.replace(model, params=params if mesh else _on_one_device(params))


def _on_one_device(params: Any) -> Any:
    """The weights on the first device, where it has room for them twice: a decoded layout is a copy."""
    memory, size = processes.device_memory(), sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if jax.process_count() > 1 or (memory is not None and 2 * size > memory):
        return params
    return jax.device_put(params, jax.devices()[0])
