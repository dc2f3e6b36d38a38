"""Checkpoints of (params, optimizer state) through Orbax: atomic, the last few kept, restored onto any mesh."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of a run, in `workdir/ckpt`."""

    def __init__(self, workdir: Path, *, keep: int):
        self.folder = _folder(workdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = _manager(self.folder, max_to_keep=keep, create=False, enable_async_checkpointing=False)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, opt_state: Any) -> None:
        """Write the step's checkpoint; older ones go only when it is whole. OSError where the disk is full."""
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_tree(params, opt_state)))
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise many kinds for one full disk
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({free / 2**30:.2f} GiB free, "
                f"{nbytes(params, opt_state) / 2**30:.2f} GiB needed): free some space and start again; "
                f"finished steps are in the seed log ({_first_line(error)})"
            ) from error

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """The step's (params, opt_state), like the given trees of `abstract` leaves: shapes, dtypes, shardings."""
        with _restoring(step, self.folder, "the run goes on from an older one or from the seed log"):
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(_tree(params, opt_state)))
        leaves = jax.tree.leaves(restored["opt_state"])
        return restored["params"], jax.tree.unflatten(jax.tree.structure(opt_state), leaves)

    def close(self) -> None:
        self._manager.close()


def saved_steps(workdir: Path) -> list[int]:
    """The steps that the run's directory has checkpoints of; nothing in it is changed."""
    if not _folder(workdir).is_dir():
        return []
    with _manager(_folder(workdir), read_only=True) as manager:
        return sorted(manager.all_steps())


def restore_params(workdir: Path, step: int, params: Any) -> Any:
    """The weights alone of the step's checkpoint, like the given tree of `abstract` leaves; nothing is changed.
    Raises OSError where the checkpoint is damaged, or gone by now."""
    item = {"params": params}
    where = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=where, partial_restore=True)
    remedy = "the step is replayed from the seed log"
    with _manager(_folder(workdir), read_only=True) as manager, _restoring(step, workdir, remedy):
        return manager.restore(step, args=args)["params"]


@contextlib.contextmanager
def _restoring(step: int, folder: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(
            f"the checkpoint of step {step} in {folder} cannot be restored ({_first_line(error)}): delete that "
            f"folder, and {remedy}"
        ) from error


def _folder(workdir: Path) -> Path:
    return Path(workdir).resolve() / "ckpt"


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    """Processes wait for one another outside of the devices, which may be at work that nobody waits for any more."""
    count = jax.process_count()
    over_the_store = ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)
    return ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(multiprocessing_options=over_the_store, **options)
    )


def abstract(tree: Any) -> Any:
    """Shape, dtype and sharding of every leaf, without its memory."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def nbytes(*trees: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


def _tree(params: Any, opt_state: Any) -> dict:
    """The state as plain containers: a list of leaves survives a change of optax's classes."""
    return {"params": params, "opt_state": dict(enumerate(jax.tree.leaves(opt_state)))}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
