"""The weights of a run, moved by entries of its seed log: live, on resuming and in a replay alike."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from es_jax.core.mesh import leaf_sharding, make_mesh, param_shardings
from es_jax.optim.chains import build_optimizer
from es_jax.training import workdir as rundir
from es_jax.training.checkpoint import abstract, restore_params, saved_steps
from es_jax.training.config import RunConfig
from es_jax.training.es_step import of_update, placed_weights, update
from es_jax.training.seedlog import Entry, SeedLog
from es_jax.weights.model import Model, load_model


def load_base(config: RunConfig, mesh: Mesh) -> Model:
    """The base model of a run, its weights in model.param_dtype and cut over all devices of the mesh."""
    if not config.model.source:
        raise ValueError("model.source is empty: set it to a Hugging Face folder, a .gguf file or a hub name")
    return load_model(
        config.model.source,
        mesh=mesh,
        dtype=jnp.dtype(config.model.param_dtype),
        shardings=lambda name, shape: leaf_sharding(mesh, shape),
    )


class State:
    """Weights and optimizer state.

    Attributes:
      params: θ; `apply` donates them, so keep no reference across it.
      opt_state: of the optax chain, the anchor among it.
      drift: ‖θ − θ₀‖, a device scalar.
      sentence: what the optimizer is.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, params: Any):
        if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
            raise ValueError("jax_threefry_partitionable is off, which changes the noise: unset it and start again")
        self._config, self._mesh = of_update(config), mesh
        tx, self.sentence = build_optimizer(config, params)
        anchored = config.optim.anchor.penalty != "none"
        self._base = None if anchored else jax.tree.map(jnp.copy, params)
        self.params = params
        shardings = param_shardings(mesh, jax.eval_shape(tx.init, params))  # by shape alone, as the parameters' own are
        self.opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
        self.drift: jax.Array | float = 0.0

    @property
    def base(self) -> Any:
        """θ₀: a copy of its own, or the optimizer's anchor."""
        return optax.tree_utils.tree_get(self.opt_state, "anchor") if self._base is None else self._base

    def apply(self, entry: Entry) -> None:
        """Move the weights from step − 1 to the entry's step. Nothing else ever moves them."""
        members, weights = placed_weights(self._mesh, entry.members, np.array(entry.weights, np.float32))
        self.params, self.opt_state, self.drift = update(
            self._config, self._mesh, self.params, self.opt_state, self._base, members, weights
        )


def replay(
    workdir: str | Path, *, steps: Sequence[int] | None = None, mesh: Mesh | None = None
) -> Iterator[tuple[int, Any]]:
    """The weights of a run's steps, rebuilt from base weights and seed log alone, bit for bit, on any mesh.

    Args:
      workdir: a run's directory; only config.json and seedlog.jsonl are read.
      steps: which to yield, 0 (the base weights) to the last; all by default. They come in order. Of a GRPO run,
        whose log does not hold what its steps were made of, those with a checkpoint, and 0.
      mesh: where to rebuild; all devices by default.

    Yields:
      (step, params). Copy the parameters if you keep them: the next step reuses their memory.

    Raises:
      ValueError: a step that the log does not hold, or base weights that are not those of the run.
      FileNotFoundError: no run in the directory.
    """
    workdir = Path(workdir)
    config = rundir.read_config(workdir)
    log = SeedLog(workdir, writable=False)
    wanted = sorted(set(range(len(log.entries) + 1) if steps is None else steps))
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= len(log.entries):
        raise ValueError(f"steps are {wanted[0]} to {wanted[-1]}, but {workdir} holds steps 0 to {len(log.entries)}")
    if config.method != "es":
        saved = saved_steps(workdir)
        wanted = [0, *saved] if steps is None else wanted
        _check_saved(workdir, wanted, saved)
    mesh = make_mesh() if mesh is None else mesh
    model = load_base(config, mesh)
    rundir.check_base(workdir, config.model.source, model.digest)
    if config.method != "es":
        like = abstract(model.params)
        yield from ((step, restore_params(workdir, step, like) if step else model.params) for step in wanted)
        return
    state = State(config, mesh, model.params)
    del model
    if 0 in wanted:
        yield 0, state.params
    for entry in log.entries[: wanted[-1] if wanted else 0]:
        state.apply(entry)
        if entry.step in wanted:
            yield entry.step, state.params


def _check_saved(workdir: Path, wanted: Sequence[int], saved: Sequence[int]) -> None:
    """Raises ValueError for a step, other than 0, that has no checkpoint."""
    for step in wanted:
        if step and step not in saved:
            raise ValueError(
                f"step {step} of {workdir} cannot be rebuilt: the log of a GRPO run does not hold its completions, and "
                f"there are checkpoints of steps {', '.join(map(str, saved)) or 'none'} alone; raise train.keep, or "
                "lower train.checkpoint_every, to have more of them"
            )
