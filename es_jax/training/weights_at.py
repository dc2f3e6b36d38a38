"""The weights of any step of a run.

They come from the step's checkpoint if there is one, and otherwise from a replay of the seed log. If neither works, an
error says why.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from es_jax.core import processes
from es_jax.core.mesh import make_mesh
from es_jax.models.sharding import leaf_sharding
from es_jax.models.transformer import param_shapes
from es_jax.rundir import directory
from es_jax.rundir.checkpoints import Checkpoints, restore_params, saved_steps
from es_jax.rundir.places import MODELS
from es_jax.rundir.seed_log import Entry, SeedLog, read_entries
from es_jax.training.config import RunConfig, read_config
from es_jax.training.state import State, base_config, check_finite, load_base
from es_jax.weights.model import load_outline

logger = logging.getLogger(__name__)


def replay(
    workdir: str | Path, *, steps: Sequence[int] | None = None, mesh: Mesh | None = None
) -> Iterator[tuple[int, Any]]:
    """Rebuilds the weights of a run's steps from the base weights and the seed log alone, bit for bit, on any mesh.

    There is one exception. If a run has antithetic pairs and random streams of version 1 or 2 (config.json), the bits
    are the same only on the kind of device that trained it (docs/speed.md).

    Args:
      workdir: a run's directory. Only config.json and seedlog.jsonl are read.
      steps: which steps, from 0 (the base weights) to the last; all by default. They come in ascending order. The log
        of a GRPO run does not hold what its steps were made of, so only steps with a checkpoint, and 0, can be had.
      mesh: the devices to rebuild on; all of them by default.

    Yields:
      (step, params). The next step reuses the memory of `params`, so copy what you keep.

    Raises:
      ValueError: the log does not hold a step, a step's weights are not finite, or the base weights are not those of
        the run.
      FileNotFoundError: the directory has no run.

    Examples:
      >>> import tempfile
      >>> from es_jax import run
      >>> config = {
      ...     "model": {"source": "lab"},
      ...     "task": {"name": "lab-add", "train_size": 8},
      ...     "es": {"population": 4, "sigma": 0.01},
      ...     "decode": {"max_prompt_tokens": 16, "max_new_tokens": 6},
      ...     "train": {"steps": 2},
      ...     "evals": {"every": 0},
      ... }
      >>> workdir = tempfile.mkdtemp()
      >>> result = run(config, workdir)
      >>> *_, (step, params) = replay(workdir)
      >>> step, all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(result.params)))
      (2, True)
    """
    return weights_at(workdir, steps, mesh=mesh, checkpoints=False)


def weights_at(
    workdir: str | Path, steps: Sequence[int] | None, *, mesh: Mesh | None = None, checkpoints: bool = True
) -> Iterator[tuple[int, Any]]:
    """Gives what `replay` gives, but reads a step that has a checkpoint from it.

    Nothing in the directory is changed.

    Args:
      workdir: a run's directory.
      steps: which steps; None is all.
      mesh: the devices; all of them by default.
      checkpoints: False replays the seed log, where it can be replayed.

    Yields:
      (step, params), as `replay` does.

    Raises:
      ValueError: as `replay`.
      FileNotFoundError: the directory has no run.
      OSError: a checkpoint is damaged.
    """
    workdir = Path(workdir)
    config, entries = read_config(workdir, needs=MODELS), read_entries(workdir)
    directory.check_files(workdir, config.model.source)
    saved = saved_steps(workdir) if checkpoints or not config.record.replayable else []
    every = range(len(entries) + 1) if config.record.replayable else [0, *saved]
    wanted = sorted(set(every if steps is None else steps))
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= len(entries):
        raise ValueError(
            f"steps are {wanted[0]} to {wanted[-1]}, but {workdir} has only steps 0 to {len(entries)}: choose among "
            "them"
        )
    for step in wanted:
        if step not in every:
            raise ValueError(
                f"step {step} of {workdir} cannot be rebuilt: the log of a {config.record.title} run does not hold "
                f"its completions, and the steps with a checkpoint are: {', '.join(map(str, saved)) or 'none'}. To "
                "keep more checkpoints, raise train.keep_checkpoints or lower train.checkpoint_every"
            )
    mesh = mesh or make_mesh()
    rebuilt = _rebuilt(workdir, config, mesh, entries, [step for step in wanted if step not in saved])
    for step in wanted:
        params = _restored(workdir, config, step, mesh) if step in saved else next(rebuilt)
        check_finite(
            params,
            f"step {step} of {workdir}: its",
            "choose an earlier step; weights are not finite from the step on where drift is null in metrics.jsonl",
        )
        yield step, params


def _restored(workdir: Path, config: RunConfig, step: int, mesh: Mesh) -> Any:
    dtype = jnp.dtype(config.model.param_dtype)
    like = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=leaf_sharding(mesh, path, shape))
        for path, shape in param_shapes(base_config(config)).items()
    }
    return restore_params(workdir, step, unflatten_dict(like, sep="/"))


def _rebuilt(workdir: Path, config: RunConfig, mesh: Mesh, entries: list[Entry], steps: list[int]) -> Iterator[Any]:
    """The weights of ascending steps, from the base weights and the log."""
    model = load_base(config, mesh)
    directory.check_base(workdir, config.model.source, model.digest)
    if not any(steps):
        yield from [model.params] * len(steps)
        return
    if (anchor := config.optim.anchor.source) is not None:
        directory.check_base(workdir, anchor, load_outline(anchor).digest, of="optim.anchor")
    state = State(config, mesh, model.params, directory.read(workdir)["streams"])
    del model
    if 0 in steps:
        yield state.params
    for entry in entries[: steps[-1]]:
        state.apply(entry)
        if entry.step in steps:
            yield state.params


def check_steps(config: RunConfig, workdir: Path) -> None:
    """Raises ValueError if a run has more finished steps than train.steps, before anything in its directory changes. It
    warns if a change of train.steps changes a schedule."""
    last, steps = len(read_entries(workdir)), config.train.steps
    if last > steps:
        raise ValueError(
            f"train.steps is {steps} but {workdir} has {last} finished steps: set train.steps to {last}, or higher to "
            f"continue, or choose another --workdir; python -m es_jax.export --step={steps} writes the weights of "
            f"step {steps}"
        )
    if last and (before := directory.read(workdir)["config"]["train"]["steps"]) != steps and processes.first():
        for field, text in config.schedules.items():
            if text != "constant":
                logger.warning(
                    "train.steps was %d and is now %d: %s %r ends at the new last step", before, steps, field, text
                )


def resume(config: RunConfig, workdir: Path, state: State, log: SeedLog, checkpoints: Checkpoints) -> None:
    """Bring the state of a run to its last finished step: restore the newest checkpoint, then replay the steps after
    it. If the log cannot be replayed, the run goes back to the checkpoint and makes the steps after it again.
    """
    last, saved = len(log.entries), checkpoints.latest() or 0
    if saved > last:
        raise ValueError(
            f"{workdir} has a checkpoint of step {saved}, but its seed log ends at step {last}: restore "
            "seedlog.jsonl, or delete the newer checkpoints"
        )
    if saved:
        state.restore(lambda *like: checkpoints.restore(saved, *like))
    if config.record.replayable:
        for entry in log.entries[saved:]:
            state.apply(entry)
        if last:
            logger.info(
                "resumed at step %d: restored the checkpoint of step %s, and replayed the steps after it", last, saved
            )
    elif last > saved:
        logger.info("resumed at step %d, the last checkpoint; the steps up to %d are made again", saved, last)
        log.cut(saved)
    if log.entries:
        whose = f"{workdir} cannot continue from step {len(log.entries)}: its"
        check_finite(state.params, whose, "start again with a lower optim.learning_rate in another --workdir")
