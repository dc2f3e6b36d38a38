"""The weights of a run, moved by entries of its seed log: live, on resuming and in a replay alike."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from es_jax.core import processes
from es_jax.core.mesh import make_mesh, place, replicated
from es_jax.core.tree import named_leaves
from es_jax.models.config import TransformerConfig
from es_jax.models.sharding import check_heads, leaf_sharding, members_spread
from es_jax.models.transformer import param_shapes
from es_jax.profiling.clock import launched
from es_jax.rundir import directory
from es_jax.rundir.checkpoints import abstract, restore_params, saved_steps
from es_jax.rundir.seed_log import Entry, SeedLog
from es_jax.training.config import RunConfig, read_config
from es_jax.training.es_step import (
    compute_dtype,
    distance,
    estimate_square,
    of_rated_update,
    optimizer,
    placed_weights,
    state_shardings,
    update,
)
from es_jax.weights.model import Model, config_only, load_model


def mesh_of(
    config: RunConfig, model: TransformerConfig, *, devices: list | None = None, memory: int | None = None
) -> Mesh:
    """The mesh of a run: as the config says, the rest chosen from the devices and the model's size.

    `devices`: all there are by default; `memory`: bytes of one of them, as it tells itself by default.

    Raises:
      ValueError: sizes that the devices or the model's heads do not allow.
    """
    devices = jax.devices() if devices is None else devices
    spread = config.mesh.model
    if spread is None:
        numbers = sum(math.prod(shape) for shape in param_shapes(model).values())
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") if memory is None else memory
        room = len(devices) // (config.mesh.groups or 1)
        spread = members_spread(model, room, member_bytes=numbers * compute_dtype(config).itemsize, memory=memory)
    check_heads(model, spread)
    return make_mesh(config.mesh.groups, spread, devices=devices)


def load_base(config: RunConfig, mesh: Mesh) -> Model:
    """The base model of a run, its weights in model.param_dtype and cut over all devices of the mesh."""
    return _load(config.model.source, config, mesh)


def load_anchor(config: RunConfig, mesh: Mesh, params: Any) -> Any:
    """The weights of optim.anchor.source, like the run's own.

    Raises:
      ValueError: another model's, by the shapes.
    """
    source = str(config.optim.anchor.source)
    anchor = _load(source, config, mesh).params
    shapes = [{name: leaf.shape for name, leaf in named_leaves(tree)} for tree in (anchor, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"optim.anchor.source {source!r} has other parameters than model.source: give the same model")
    return anchor


def _load(source: str, config: RunConfig, mesh: Mesh) -> Model:
    return load_model(
        source,
        mesh=mesh,
        dtype=jnp.dtype(config.model.param_dtype),
        shardings=lambda name, shape: leaf_sharding(mesh, name, shape),
    )


def base_config(config: RunConfig) -> TransformerConfig:
    """The shape of the run's base model. Raises ValueError when model.source is empty, or what cannot be read."""
    if not config.model.source:
        raise ValueError("model.source is empty: set it to a Hugging Face folder, a .gguf file or a hub name")
    return config_only(config.model.source)


class State:
    """Weights and optimizer state.

    Attributes:
      params: θ; `apply` donates them, so keep no reference across it.
      opt_state: of the optax chain, the anchor among it.
      drift: ‖θ − θ₀‖, a device scalar.
      offset: ‖anchor − θ₀‖ at the start; 0 where training begins at the anchor.
      sentence: what the optimizer is.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, params: Any):
        if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
            raise ValueError("jax_threefry_partitionable is off, which changes the noise: unset it and start again")
        check_memory(config, mesh)
        self._run, self._config, self._mesh = config, of_rated_update(config), mesh
        tx, self.sentence = optimizer(config, mesh, params)
        anchor = config.optim.anchor
        stays = anchor.penalty != "none" and anchor.ema_decay is None and anchor.source is None
        self._base = None if stays else jax.tree.map(jnp.copy, params)
        self.params = params
        where = state_shardings(config, mesh, jax.eval_shape(tx.init, params))
        self.opt_state = jax.jit(tx.init, out_shardings=where)(params)
        self.drift: jax.Array | float = 0.0
        self.offset = 0.0
        if anchor.source is not None:
            other = load_anchor(config, mesh, params)
            self.offset = math.sqrt(sum(float(x) for x in jax.tree.leaves(jax.tree.map(_square, other, params))))
            kept = jax.tree.map(lambda leaf: leaf.sharding, optax.tree_utils.tree_get(self.opt_state, "anchor"))
            self.opt_state = optax.tree_utils.tree_set(self.opt_state, anchor=jax.device_put(other, kept))

    @property
    def base(self) -> Any:
        """θ₀: a copy of its own, or the optimizer's anchor."""
        return optax.tree_utils.tree_get(self.opt_state, "anchor") if self._base is None else self._base

    def apply(self, entry: Entry) -> None:
        """Move the weights from step − 1 to the entry's step. Nothing else ever moves them."""
        members, weights = placed_weights(self._mesh, entry.members, np.array(entry.weights, np.float32))
        rates = self._run.logged_rates(entry)
        steps = np.array([rates.learning_rate, rates.learning_rate * rates.strength], np.float32)
        steps = place(steps, replicated(self._mesh))
        self.params, self.opt_state, squares = update(
            self._config, self._mesh, self.params, self.opt_state, self._base, members, weights, steps
        )
        self.drift = distance(launched("update", squares))

    def estimate_seconds(self, entry: Entry) -> float:
        """How long the estimate of a step takes alone, at best of three times behind the one that compiles it.

        Raises:
          Preempted: the run is to stop.
        """
        given = placed_weights(self._mesh, entry.members, np.array(entry.weights, np.float32))
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            processes.wait(
                lambda: jax.block_until_ready(estimate_square(self._config, self._mesh, self.params, *given))
            )
            seconds.append(time.monotonic() - began)
        return min(seconds[1:])


def check_memory(config: RunConfig, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of the mesh have the memory that optim.anchor.memory names."""
    wanted, device = config.optim.anchor.memory, mesh.local_devices[0]
    known = [memory.kind for memory in device.addressable_memories()]
    if wanted not in ("device", *known):
        raise ValueError(
            f"optim.anchor.memory is {wanted!r}, but {device.device_kind} has {', '.join(known)}: set it to 'device'"
        )


@jax.jit
def _square(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))


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
    config = read_config(workdir)
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
    directory.check_base(workdir, config.model.source, model.digest)
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
                f"there are checkpoints of steps {', '.join(map(str, saved)) or 'none'} alone; raise train.keep_checkpoints, or "
                "lower train.checkpoint_every, to have more of them"
            )
