"""Checkpoints of (params, optimizer state) through Orbax: atomic, the last few kept, restored onto any mesh."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from es_jax.core import processes
from es_jax.rundir import directory

UNFINISHED = "orbax-checkpoint-tmp"  # in the name of a folder that Orbax writes


@dataclasses.dataclass
class _Kept:
    """Orbax's policy of which checkpoints stay: the latest, and that of one step besides."""

    latest: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in steps[-self.latest :] or step == self.best for step in steps]


class Checkpoints:
    """The checkpoints of a run, in `workdir/ckpt`: the latest `keep`, and that of the step `best`, if it has one."""

    def __init__(self, workdir: Path, *, keep: int):
        self.folder = _folder(workdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.folder, os.O_RDONLY)
        self._close_folder = weakref.finalize(self, os.close, self._descriptor)
        self._remove_unfinished()
        self._kept = _Kept(keep)
        options = {"create": False, "enable_async_checkpointing": False}
        self._manager = _manager(self.folder, preservation_policy=self._kept, **options)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """A step whose checkpoint stays until another one is set."""
        return self._kept.best

    @best.setter
    def best(self, step: int | None) -> None:
        self._kept.best = step

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, opt_state: Any) -> None:
        """Write the step's checkpoint; older ones go only when it is whole. OSError where the disk is full."""
        self._remove_unfinished()
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_tree(params, opt_state)))
            self._manager.wait_until_finished()
            _write_sums(self.folder / str(step))
        except Exception as error:  # Orbax and TensorStore raise many kinds for one full disk
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({free / 2**30:.2f} GiB free, "
                f"{nbytes(params, opt_state) / 2**30:.2f} GiB needed): free some space and start again; "
                f"finished steps are in the seed log ({_reason(error)})"
            ) from error

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """The step's (params, opt_state), like the given trees of `abstract` leaves: shapes, dtypes, shardings."""
        with _restoring(self.folder / str(step), "the run goes on from an older one or from the seed log"):
            _check_sums(self.folder / str(step))
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(_tree(params, opt_state)))
        leaves = jax.tree.leaves(restored["opt_state"])
        return restored["params"], jax.tree.unflatten(jax.tree.structure(opt_state), leaves)

    def close(self) -> None:
        self._manager.close()
        self._close_folder()

    def _remove_unfinished(self) -> None:
        """Remove what a killed process left of a save; but not while another process, which may be saving, has the
        folder open. Network file systems do not lock folders: there the lock of the run has to do."""
        if not processes.first():
            return
        alone = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            alone = not isinstance(error, BlockingIOError)
        for path in self.folder.glob(f"*{UNFINISHED}*") if alone else ():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)


def saved_steps(workdir: Path) -> list[int]:
    """The steps that the run's directory has checkpoints of; nothing in it is changed."""
    if not _folder(workdir).is_dir():
        return []
    with _reader(_folder(workdir)) as manager:
        return sorted(manager.all_steps())


def restore_params(workdir: Path, step: int, params: Any) -> Any:
    """The weights alone of the step's checkpoint, like the given tree of `abstract` leaves; nothing is changed.
    Raises OSError where the checkpoint is damaged, or gone by now."""
    item = {"params": params}
    where = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=where, partial_restore=True)
    folder, remedy = _folder(workdir) / str(step), "the step is replayed from the seed log, where that can be"
    with _reader(_folder(workdir)) as manager, _restoring(folder, remedy):
        _check_sums(folder)
        return manager.restore(step, args=args)["params"]


@contextlib.contextmanager
def _restoring(folder: Path, remedy: str) -> Iterator[None]:
    """An error says which checkpoint is damaged, and comes last. Orbax closes the loop in which it reads at the first
    file that it cannot read, and each of the other reads would print a traceback about that whenever it ends."""
    hook = sys.unraisablehook

    def print_others(event: Any) -> None:
        code = getattr(event.object, "cr_code", None)
        if str(event.exc_value) != "Event loop is closed" and not (code and "orbax" in code.co_filename):
            hook(event)

    sys.unraisablehook = print_others
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(
            f"the checkpoint of step {folder.name} in {folder} cannot be restored ({_reason(error)}): delete that "
            f"folder, and {remedy}"
        ) from error
    sys.unraisablehook = hook


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _share(paths: Iterable[Path]) -> list[Path]:
    """Of several processes each reads its own."""
    return sorted(paths)[jax.process_index() :: jax.process_count()]


def _write_sums(folder: Path) -> None:
    """The sha256 of every file of the checkpoint, by its name in the folder: sums.<process>.json."""
    every = (path for path in folder.rglob("*") if not path.name.startswith("sums."))  # which others write now
    files = _share(path for path in every if path.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = {str(path.relative_to(folder)): value for path, value in zip(files, pool.map(_sum, files), strict=True)}
    directory.write_json(folder / f"sums.{jax.process_index()}.json", sums)


def _check_sums(folder: Path, *, depth: int | None = None) -> None:
    """Raises ValueError where a file, of the given depth only, is not what was written. A checkpoint of an earlier
    version, or one whose process was killed just after it, has no sums."""
    if not (folder / "default").is_dir():
        raise FileNotFoundError("it has no folder named default")
    written: dict[Path, str] = {}
    for path in folder.glob("sums.*.json"):
        try:
            sums = json.loads(path.read_text(encoding="utf-8")).items()
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{path.name} is not what was written") from None
        written |= {folder / name: value for name, value in sums}
    files = _share(path for path in written if depth in (None, len(path.relative_to(folder).parts)))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = dict(zip(files, pool.map(_sum, files), strict=True))
    if differing := [str(path.relative_to(folder)) for path in files if found[path] != written[path]]:
        raise ValueError(f"{', '.join(differing)} is not what was written")


def _folder(workdir: Path) -> Path:
    return Path(workdir).resolve() / "ckpt"


@contextlib.contextmanager
def _reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """Of a folder in which nothing is changed; Orbax would warn three times that it only reads."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        manager = _manager(folder, read_only=True)
    finally:
        logger.setLevel(level)
    with manager:
        yield manager


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    """Processes wait for one another outside of the devices, which may be at work that nobody waits for any more."""
    count = jax.process_count()
    over_the_store = ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)
    manager_options = ocp.CheckpointManagerOptions(multiprocessing_options=over_the_store, **options)
    try:
        return ocp.CheckpointManager(folder, options=manager_options)
    except Exception as error:  # it reads a file of each checkpoint: which is damaged?
        for step in sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()):
            with _restoring(folder / str(step), "the run goes on from an older one or from the seed log"):
                _check_sums(folder / str(step), depth=1)
        raise OSError(
            f"the checkpoints in {folder} cannot be read ({_reason(error)}): delete the damaged one"
        ) from error


def abstract(tree: Any) -> Any:
    """Shape, dtype and sharding of every leaf, without its memory."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def nbytes(*trees: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


def _tree(params: Any, opt_state: Any) -> dict:
    """The state as plain containers: a list of leaves survives a change of optax's classes."""
    return {"params": params, "opt_state": dict(enumerate(jax.tree.leaves(opt_state)))}


def _reason(error: Exception) -> str:
    """Of what a library says, without its advice."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:300]
