"""A run's directory: whose it is, what it was started with, and that only one process trains in it."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from es_jax.core import processes
from es_jax.core.names import ADDED, RENAMED
from es_jax.rundir.places import CODE, flat, whole
from es_jax.weights.files import small_sums

logger = logging.getLogger(__name__)

# What may change between the start and the resumption of a run: nothing that a step's bits depend on.
CHANGEABLE = (
    *("train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.samples", "train.profile"),
    *("train.keep_best", "train.tracker"),
    *("evals.", "mesh.groups", "mesh.model", "optim.anchor.memory", "task.timeout_seconds"),
)
ANCHOR = "optim.anchor.source"
PATHS = ("model.source", ANCHOR, "task.data_dir")  # may change too: digests say that the content is the same
WANTED = ("evals.", "task.data_dir")  # fields that say which held-out rows are wanted
SIZES = ("decode.slots", "decode.members_at_once")  # may change as well, and the seed log tells it
TRAINING_ROWS, TEST_ROWS = "training_rows", "test_rows"  # digests; ROWS is of both, as they were when the run began
ROWS = "rows"
PARENT = "parent"  # the run and the step that a run started from
SUM = "sha256"  # the field of config.json that has the sum of the others
DATE = "model.template_date"
SOURCES = "task_sources"  # sums of the tasks from outside the package; they may change, with a warning
PACKAGES = ["es_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy"]


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Make the directory and hold its lock inside the context; of several processes the first holds it. Afterwards the
    lock is gone, and so is a directory that was made here and in which no start got as far as its config.json.

    Raises:
      OSError: it cannot be made, another process trains in it, or processes of the run do not see the same directory.
    """
    new = not workdir.exists()
    lock = _lock(workdir) if processes.first() else None
    try:
        if lock:
            processes.exchange({0: (workdir / ".lock").read_text()})
        else:
            _check_shared(workdir, processes.exchange({})[0])
        yield
    finally:
        if lock:
            (workdir / ".lock").unlink(missing_ok=True)  # while it is held: who waits for it finds that it is another
            lock.close()
            if new and not (workdir / "config.json").exists():
                _remove_empty(workdir)


def _check_shared(workdir: Path, content: str) -> None:
    for _ in range(100):  # a network's file system may take a moment
        with contextlib.suppress(OSError):
            if (workdir / ".lock").read_text() == content:
                return
        time.sleep(0.1)
    raise OSError(
        f"workdir {workdir} of process {jax.process_index()} is not that of process 0: all processes of a run need one "
        "directory on a file system that they share"
    )


def _lock(workdir: Path) -> Any:
    path = workdir / ".lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"workdir {workdir} cannot be used ({error.strerror}): choose another --workdir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise OSError(f"workdir {workdir} is in use by another process: wait for it, or choose another") from None
    if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
        lock.close()  # whoever held it has just removed it
        return _lock(workdir)
    lock.truncate(0)
    lock.write(f"{os.getpid()} {time.time_ns()}\n")
    lock.flush()
    for partial in workdir.glob("*.tmp"):  # what a process that was killed did not bring to its end
        partial.unlink(missing_ok=True)
    return lock


def _remove_empty(workdir: Path) -> None:
    """Remove the directory of a start that failed, unless it holds more than compiled programs and empty files."""
    rest = [path for path in workdir.iterdir() if path.name != "cache" and not (path.is_file() and _is_empty(path))]
    if not rest:
        shutil.rmtree(workdir, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def settle(
    workdir: Path,
    config: dict[str, Any],
    *,
    identity: dict[str, Any],
    started: bool,
    mesh: dict[str, int] | None = None,
    places: Mapping[str, Any] | None = None,
    log: Callable[[dict[str, tuple[Any, Any]]], None] = lambda sizes: None,
) -> None:
    """Write config.json, or check that the run that is there is this one.

    Of several processes the first writes; all call it.

    Args:
      config: the run's fields, as nested dicts.
      identity: what else a run is, by name: digests of base weights and of prompts, the compute dtype, …
      started: whether it has a finished step. Without one the directory is taken over, whatever it was meant for.
      mesh: the sizes of the mesh, which may be another each time.
      places: where the files are that the fields name: `es_jax.rundir.places.record`.
      log: is told of each of SIZES (its value before, and now), in the first process, when the run goes on.

    Raises:
      ValueError: the directory holds another run, or this process has another one than the first; what differs is
        named.
    """
    if processes.first():
        config = json.loads(json.dumps(config))  # as it is read back: lists for tuples
        _settle(workdir, config, identity, started, mesh or {}, places or {}, log)
    processes.barrier()
    there = read(workdir)
    own = {name: value for name, value in identity.items() if name != ROWS or TRAINING_ROWS not in identity}
    differing = [f"{k} is {there.get(k)!r} there and {v!r} here" for k, v in own.items() if there.get(k) != v]
    if differing:
        raise ValueError(
            f"process {jax.process_index()} differs from process 0: {'; '.join(differing)}. All processes of a run "
            "need the same model files, rows and tasks"
        )


def _settle(
    workdir: Path,
    config: dict[str, Any],
    identity: dict[str, Any],
    started: bool,
    mesh: dict[str, int],
    places: Mapping[str, Any],
    log: Callable[[dict[str, tuple[Any, Any]]], None],
) -> None:
    path, versions = workdir / "config.json", _versions()
    content = {"config": config, **identity, "mesh": mesh, **places, "versions": versions}
    if path.exists() or started:
        try:
            then = {"files": identity.get("files"), **read(workdir)}  # earlier versions did not keep them
        except ValueError:
            if started:
                raise
            then = {"config": {}}
        changed = _changed(then, content, identity)
        if started and changed:
            raise ValueError(_refusal(workdir, then, changed))
        if changed:
            shutil.rmtree(workdir / "evals", ignore_errors=True)  # of that config's weights before the first step
        else:
            sentences = changed_sources(then, identity)
            for sentence in sentences:
                logger.warning(sentence)
            resumed = versions | ({SOURCES: then[SOURCES]} if sentences else {})
            new = (SOURCES, TRAINING_ROWS, TEST_ROWS, PARENT, *([] if started else [ROWS]))
            now = {name: identity[name] for name in new if name in identity}
            then.pop(PARENT, None)
            own = {"config": config, "mesh": mesh, **places, **now}
            content = {**then, **own, "resumed": [*then.get("resumed", []), resumed]}
            if started:
                _resize(flat(then["config"]), flat(config), log)
    write_json(path, content | {SUM: _sum(content)}, indent=2)


def _changed(then: dict[str, Any], now: dict[str, Any], identity: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two contents of config.json and may not: its values there and here, by name."""
    old, new = (flat({**facts["config"], **{k: facts.get(k) for k in identity}}) for facts in (then, now))
    differing = {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}
    free = [*CHANGEABLE, *SIZES, *PATHS, SOURCES, ROWS if TRAINING_ROWS in then else TRAINING_ROWS]
    if None in differing.get(ANCHOR, ()):
        free.remove(ANCHOR)
    if old.get(DATE) is None:  # from before the field was there: it may be told
        free.append(DATE)
    free += [name for name in CODE if whole(name, then) == whole(name, now)]
    wanted = any(name.startswith(WANTED) and name != "evals.every" for name in differing)  # other held-out rows
    free += [name for name, (was, _) in differing.items() if name.startswith(TEST_ROWS) and (wanted or was is None)]
    return {name: pair for name, pair in differing.items() if not name.startswith(tuple(free))}


def _refusal(workdir: Path, then: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> str:
    differing = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items())
    if all(name.startswith(TEST_ROWS) for name in changed):
        tasks = ", ".join(name.partition(".")[2] for name in changed)
        return (
            f"the held-out rows of {tasks}, or the rules by which they are graded, changed since {workdir} was "
            f"evaluated, and no field of evals says so ({differing}): restore them, or choose another --workdir"
        )
    text = f"{workdir} holds a run of another config: {differing}. Choose another --workdir, or set the fields back"
    if {ROWS, TRAINING_ROWS} & set(changed) and flat(then["config"]).get(DATE) is None:
        text += f". If the chat template writes the date, set {DATE} to the day the run began"
    if list(changed) != [ROWS]:
        return text
    return (
        f"{text}. The run is of an earlier version, whose sum of rows has the held-out ones in it: if evals is to "
        "change, let it go on once with evals as it was"
    )


def _resize(was: dict[str, Any], now: dict[str, Any], log: Callable[[dict[str, tuple[Any, Any]]], None]) -> None:
    """Tell the log, and the user, where the sizes of decoding are not what they were."""
    log({name: (was.get(name), now.get(name)) for name in SIZES})
    for name in SIZES:
        if was.get(name) not in (None, now.get(name)):
            logger.warning(
                "%s was %s and is %s: completions from now on may differ from those that the run would have made, "
                "where two tokens are nearly equally likely; the seed log tells it",
                name, was[name], now.get(name),
            )  # fmt: skip


def changed_sources(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences about tasks from outside the package whose source is another one now, by their sums in two records."""
    was, is_ = (facts.get(SOURCES) or {} for facts in (then, now))
    return [
        f"the source of task {name!r} changed since the run wrote its config.json: its scores may differ from before"
        for name in is_
        if name in was and was[name] != is_[name]
    ]


def read(workdir: Path) -> dict[str, Any]:
    """The content of config.json, with the fields' names of today.

    Raises:
      FileNotFoundError: there is no run here.  ValueError: the file is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {workdir} is not a run's directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields = {RENAMED.get(name, name): value for name, value in flat(content["config"]).items()}
        there = {"config": unflatten_dict(ADDED | fields, sep="."), "digest": content["digest"]}
        facts = {"streams": 1, **content, **there}  # of all runs before the streams had a version
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore it, or choose another --workdir") from None
    if facts.pop(SUM, None) not in (None, _sum(content)):
        raise ValueError(
            f"{path} is not as it was written, by its {SUM}: restore it, or delete that field from it if it was "
            "changed on purpose"
        )
    return facts


def _sum(content: dict[str, Any]) -> str:
    """sha256 of config.json's content but for the sum itself; runs of earlier versions have none."""
    fields = {name: value for name, value in content.items() if name != SUM}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_base(workdir: Path, source: str, digest: str, *, of: str = "model") -> None:
    """Raises ValueError unless weights of that digest are those of the run, `of` its "model" or its "optim.anchor"."""
    if digest != read(workdir)["digest" if of == "model" else "anchor_digest"]:
        raise ValueError(f"{of}.source {source!r} is not what {workdir} was trained from: digests differ")


def check_files(workdir: Path, source: str) -> None:
    """Raises ValueError where a file of the base model's folder, weights aside, is not what the run began with. Nothing
    is read but bytes. A run of an earlier version has nothing to compare with."""
    began = read(workdir).get("files")
    differing = [name for name, value in small_sums(source).items() if began and began.get(name) != value]
    if differing:
        raise ValueError(
            f"{', '.join(differing)} of model.source {source!r} changed since {workdir} was started: restore it, or "
            "choose another --workdir"
        )


@contextlib.contextmanager
def compilation_cache(folder: Path) -> Iterator[None]:
    """Compiled programs are kept in the folder, which may be moved or copied, unless the user has a cache already:
    what `JAX_COMPILATION_CACHE_DIR` or `jax_compilation_cache_dir` say is left as it is ("" is no cache at all)."""
    from jax.experimental.compilation_cache import compilation_cache as cache

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        yield
        return
    cache.reset_cache()  # JAX looks for a cache once, at the first compilation
    inner = jax.config.jax_persistent_cache_enable_xla_caches  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their paths would be part of programs' keys
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_enable_xla_caches", inner)
        cache.reset_cache()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError says which file could not be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}): free some space and start again; finished steps stay"
        ) from error


def check_space(workdir: Path, needed: int) -> None:
    """Raises OSError where a checkpoint of `needed` bytes does not fit on the disk."""
    if (free := shutil.disk_usage(workdir).free) < needed:
        raise OSError(
            f"workdir {workdir} has {free / 2**30:.2f} GiB free and one checkpoint needs {needed / 2**30:.2f} GiB: "
            "free some space, or choose another --workdir"
        )


def write_json(path: Path, content: dict[str, Any], *, indent: int | None = None) -> None:
    """`write_text` of the content as JSON."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """The file is the old one or the new one, whatever happens; its folder is made if need be."""
    partial = path.with_suffix(".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a new file in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(["git", *PACKAGES])}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        versions["git"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
