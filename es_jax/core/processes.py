"""The processes of one run, on one host or several: how they start, communicate and end.

They communicate through the key-value store of JAX's coordination service, which process 0 holds, never through the
devices. So a waiting process learns that another one failed, or that the run must stop, whatever the devices are doing.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

T = TypeVar("T")
GRACE = 20.0  # seconds from SIGTERM to the end of a process that reaches no checkpoint
_POLL = 0.5  # seconds between looks
_GONE = re.compile(r"Gloo|NCCL|coordination service|tasks are unhealthy")  # found in errors when a process is gone
_ABORTED = ctypes.CFUNCTYPE(None, ctypes.c_int)
_STOP: list = []  # replaces all parts of an exchange: the run must stop
_round = 0  # of exchanges
_stop, _saving = threading.Event(), threading.Event()


class Preempted(Exception):
    """One of the processes received SIGTERM: all stop at the same step."""

    def __init__(self, message: str = "terminated before the first step; the same command starts again"):
        super().__init__(message)


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def exchange(own: Mapping[int, Any]) -> dict[int, Any]:
    """The values of all processes by number, in the order of the numbers; each process passes its own. Values are JSON.

    All processes must call it, in the same order. Raises Preempted if the run must stop: in all processes, in the same
    call or in `check` before it.
    """
    if jax.process_count() == 1:
        check()
        return dict(sorted(own.items()))
    global _round
    _put(f"{_round}/{jax.process_index()}", own)
    if first():
        _put(f"{_round}/all", [_wait(f"{_round}/{i}") for i in range(jax.process_count())])
    parts = _wait(f"{_round}/all")
    if parts == _STOP:
        raise Preempted
    if first() and _round:
        _store().key_value_delete(f"es_jax/{_round - 1}/")  # all have read it, since they are in this round
    _round += 1
    return dict(sorted({int(key): value for part in parts for key, value in part.items()}.items()))


def barrier() -> None:
    """Wait for all processes."""
    exchange({})


def device_memory() -> int | None:
    """The memory of the smallest device of all processes, in bytes; None if a device does not report it, as on CPU. All
    processes call it."""
    least = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())
    return min(exchange({jax.process_index(): least}).values()) or None


def connect(mesh: Mesh) -> None:
    """Run a first collective of all processes' devices, along each axis of the mesh and over all of it, before any
    work.

    The first collective opens connections, and gloo (on CPUs) waits only 30 s for them. Processes that load and compile
    would reach it at different times; here they reach it together.
    """
    if jax.process_count() == 1:
        return
    for axes in (*((axis,) for axis in mesh.axis_names), mesh.axis_names):
        add = functools.partial(jax.lax.psum, axis_name=axes)
        total = jax.shard_map(add, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        program = jax.jit(total).lower(np.float32(1)).compile()
        barrier()
        jax.block_until_ready(program(np.float32(1)))


def fetch(tree: Any) -> Any:
    """The whole arrays on the host. If other processes hold parts of them, all processes must call it."""

    def whole(x: jax.Array) -> np.ndarray:
        here = x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def check() -> None:
    """Raises Preempted if the run must stop. Process 0 decides, so that all stop in the same round."""
    stop = _stop.is_set()
    if jax.process_count() > 1 and first():
        stop = stop or _look("stop")
        if stop:
            _put(f"{_round}/all", _STOP)
    elif jax.process_count() > 1:
        terminated, stop = stop, _look(f"{_round}/all") == _STOP
        if terminated and not stop:
            _put("stop", True, overwrite=True)
    if stop:
        raise Preempted


def wait(function: Callable[[], T]) -> T:
    """The function's result, computed in a separate thread: while that waits for the devices, this one can be stopped.

    Raises Preempted if the run must stop; the other thread is then abandoned.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        concurrent.futures.wait([future], _POLL)
        check()
        if future.done():
            return future.result()


def launch(function: Callable[..., T], *args: Any) -> T:
    """The result of a program, dispatched asynchronously; with several processes it is called through `wait`.

    On a CPU, a program that waits for other processes blocks the next launch, forever if one of them has stopped.
    """
    return function(*args) if jax.process_count() == 1 else wait(functools.partial(function, *args))


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A context in which SIGTERM requests the end of the run: `check`, `wait` and `exchange` raise Preempted.

    A process that reaches none of them, nor `saving`, within 20 s (it may be compiling) ends anyway, with status 0.
    Outside of the main thread, signals are not changed.
    """
    _stop.clear()
    _saving.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the byte in the socket counts: it arrives at once
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, before)
        writer.close()


def saving() -> None:
    """Announce that the last checkpoint is being written, so that the process gets the time for it."""
    _saving.set()


def _listen(reader: socket.socket) -> None:
    with reader:
        while data := reader.recv(16):
            if signal.SIGTERM in data:
                _stop.set()
                break
        else:
            return
    if not _saving.wait(GRACE):
        _end(f"terminated; no checkpoint within {GRACE:g} s, but finished steps are in the seed log", 0)


@contextlib.contextmanager
def joined(name: str, **options: Any) -> Iterator[None]:
    """A context in which the processes that `jax.distributed.initialize(**options)` connects form one run.

    A process that fails tells the others, which end with its message. If a process dies, the others end after
    `heartbeat_timeout_seconds`. Messages begin with `name`. `options` hold what the environment (Cloud TPU, GKE, SLURM,
    Open MPI) does not provide.
    """
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=30, **options)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(
            f"{name}: the processes of the run could not connect ({error}): give --coordinator_address=HOST:PORT of "
            "process 0, --num_processes and --process_id, unless the environment provides them"
        ) from None
    end = "another process is gone: start the same command on all hosts; finished steps are kept"
    _on_abort(f"{name}: aborted, usually because {end}")
    ended = threading.Event()

    def watch() -> None:  # it ends this process even inside a collective that a failed process never joins
        while not ended.wait(_POLL):
            _end_after_another(name)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        gone = isinstance(error, jax.errors.JaxRuntimeError | SystemExit) and _GONE.search(str(error))
        if not isinstance(error, SystemExit) and not gone:
            traceback.print_exception(error)
        _end_after_another(name)  # first: this process's error, such as a closed connection, is likely a consequence
        if gone:
            first_line = str(error).splitlines()[0].removeprefix(f"{name}: ")
            error = SystemExit(f"{name}: process {jax.process_index()} lost the others ({first_line}); {end}")
        text = str(error.code) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            _store().key_value_set(f"es_jax/failed/{jax.process_index()}", text[:2000], allow_overwrite=True)
        _end(text if isinstance(error, SystemExit) else f"{name}: process {jax.process_index()} failed", 1)
    ended.set()
    watcher.join()
    jax.distributed.shutdown()


@functools.cache  # keeps a reference to the handler
def _on_abort(text: str) -> Any:
    """JAX aborts a process that cannot reach process 0, or after the others were silent, from a thread that cannot
    raise an exception. Make the process end with the text and status 1 instead."""

    def end(number: int) -> None:
        os.write(2, f"{text}\n".encode())
        os._exit(1)

    handler = _ABORTED(end)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    return handler


def leave(text: str) -> NoReturn:
    """End this process with status 0 after all have reached their end, whatever the devices are doing."""
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    _end(text, 0)


def _end_after_another(name: str) -> None:
    """End this process with the message of another one that failed. If the store does not answer, process 0 is gone or
    the run is over; JAX itself then ends the process with a message."""
    failures: list[tuple[str, str]] = []
    with contextlib.suppress(Exception):
        failures = _store().key_value_dir_get("es_jax/failed/")
    for key, text in failures:
        if (other := key.split("/")[-1]) != str(jax.process_index()):
            _end(f"{name}: process {other} failed, so this process stops: {text}", 1)


def _end(text: str, status: int) -> NoReturn:
    """End the process at once: the devices may run abandoned work. After a failure process 0 ends last, since it holds
    the store; without the store JAX would end a process with its own message."""
    if status and first():
        time.sleep(8 * _POLL)
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


def _store() -> Any:
    from jax._src import distributed  # JAX has no public name for it; Orbax also uses this one

    return distributed.global_state.client


def _put(key: str, value: Any, *, overwrite: bool = False) -> None:
    _store().key_value_set_bytes(f"es_jax/{key}", zlib.compress(json.dumps(value).encode(), 1), overwrite)


def _wait(key: str) -> Any:
    while (value := _look(key, patience=_POLL)) is None:
        check()
    return value


def _look(key: str, *, patience: float = 0.0) -> Any:
    """The value of a key, or None if it is not set within `patience` seconds."""
    store, key, limit = _store(), f"es_jax/{key}", int(1000 * patience)
    try:
        value = store.blocking_key_value_get_bytes(key, limit) if limit else store.key_value_try_get_bytes(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error) or "DEADLINE_EXCEEDED" in str(error):
            return None
        raise
    return json.loads(zlib.decompress(value))
