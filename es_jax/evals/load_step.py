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
    """Loads the model of a run's step, for `es_jax.complete` and `es_jax.perplexity`.

    The weights are read from the step's checkpoint if there is one, and otherwise rebuilt from the seed log. They are
    in the dtype that the run computes in (model.dtype), so a greedy completion is what an evaluation of that step saw.
    The chat template sees the run's day.

    Args:
      workdir: a run's directory. Nothing in it is changed.
      step: 0 (the base model) to the last finished step, which is the default.
      mesh: the devices on which the weights are rebuilt and stay. By default they are rebuilt on all devices, and then
        put on the first one if it has room for them twice.

    Returns:
      The model, with the step's weights.

    Raises:
      OSError: the directory has no run, or the run's base model is gone.
      ValueError: the run does not have the step, it is a step of a GRPO run without a checkpoint, or the base model is
        not that of the run.

    Examples:
      >>> import tempfile
      >>> from es_jax import complete, run
      >>> config = {
      ...     "model": {"source": "lab"},
      ...     "task": {"name": "lab-add", "train_size": 8},
      ...     "es": {"population": 4, "sigma": 0.01},
      ...     "decode": {"max_prompt_tokens": 16, "max_new_tokens": 6},
      ...     "train": {"steps": 2},
      ...     "evals": {"every": 0},
      ... }
      >>> workdir = tempfile.mkdtemp()
      >>> _ = run(config, workdir)
      >>> complete(load_step(workdir, 1), "A37+48=", max_new_tokens=6)
      '85'
    """
    workdir = Path(workdir)
    config, last = read_config(workdir, needs=MODELS), steps_done(workdir)
    step = last if step is None else step
    if not 0 <= step <= last:
        raise ValueError(f"step is {step}, but {workdir} has only steps 0 to {last}: choose one of them")
    model = outline_of(workdir)
    set_date(model.tokenizer, config.model.template_date)
    everywhere = mesh or mesh_of(dataclasses.replace(config, mesh=MeshConfig()), base_config(config))
    ((_, params),) = weights_at(workdir, [step], mesh=everywhere)
    params = cast(params, compute_dtype(config))
    return dataclasses.replace(model, params=params if mesh else _on_one_device(params))


def _on_one_device(params: Any) -> Any:
    """The weights on the first device if it has room for them twice: the decoding layout is a copy."""
    memory, size = processes.device_memory(), sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if jax.process_count() > 1 or (memory is not None and 2 * size > memory):
        return params
    return jax.device_put(params, jax.devices()[0])
