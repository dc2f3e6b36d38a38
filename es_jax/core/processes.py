"""The processes of one run, on one host or many: how they start, what they tell one another, and how they end.

They talk through the key-value store of JAX's coordination service, which process 0 keeps, never through the devices:
a process that waits hears that another failed, or that the run is to stop, whatever the devices are doing.
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
GRACE = 20.0  # seconds from SIGTERM to the end of a process that could not come to a checkpoint
_POLL = 0.5  # seconds between looks
_GONE = re.compile(r"Gloo|NCCL|coordination service|tasks are unhealthy")  # in errors where a process is gone
_ABORTED = ctypes.CFUNCTYPE(None, ctypes.c_int)
_STOP: list = []  # in place of all parts of an exchange: the run is to stop
_round = 0  # of exchanges
_stop, _saving = threading.Event(), threading.Event()


class Preempted(Exception):
    """SIGTERM came to one of the processes: all stop at the same step."""

    def __init__(self, message: str = "terminated before the first step; the same command starts again from there"):
        super().__init__(message)


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def exchange(own: Mapping[int, Any]) -> dict[int, Any]:
    """What all processes have, by number, in the order of the numbers; each gives its own. Values are JSON.

    All processes must call it, in the same order. Raises Preempted when the run is to stop: in all processes, in the
    same call or in `check` before it.
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
        _store().key_value_delete(f"es_jax/{_round - 1}/")  # all have read it: they are in this round
    _round += 1
    return dict(sorted({int(key): value for part in parts for key, value in part.items()}.items()))


def barrier() -> None:
    """Wait for all processes."""
    exchange({})


def device_memory() -> int | None:
    """Bytes that the smallest device of all processes reports; None where one reports nothing, as on CPU. All processes
    call it."""
    least = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())
    return min(exchange({jax.process_index(): least}).values()) or None


def connect(mesh: Mesh) -> None:
    """Let the devices of all processes meet, along each axis of the mesh and all together, before there is work.

    Their first exchange opens connections, for which gloo, between CPUs, waits 30 s. Processes that load and compile
    come to it at different times; here they come at once.
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
    """The whole arrays on the host, also where other processes have parts of them; all processes call it then."""

    def whole(x: jax.Array) -> np.ndarray:
        here = x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def check() -> None:
    """Raises Preempted when the run is to stop. Process 0 decides it, so that all stop in the same round."""
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
    """The function's result, from a thread of its own: while it waits for the devices this one can be told to stop.

    Raises Preempted when the run is to stop; the thread is left to itself.
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
    """The result of a program, whose outputs are on their way; among several processes it is called as `wait` does.

    On a CPU, a program that waits for other processes blocks the next launch; if one of them stopped before, it would
    block forever.
    """
    return function(*args) if jax.process_count() == 1 else wait(functools.partial(function, *args))


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM asks for the end of the run: `check`, `wait` and `exchange` raise Preempted.

    A process that does not come to one of them, or to `saving`, within 20 s (it may be compiling) ends all the same,
    with status 0. In another thread than the main one, signals stay as they are.
    """
    _stop.clear()
    _saving.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the byte in the socket is what counts: it comes at once
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, before)
        writer.close()


def saving() -> None:
    """Say that the last checkpoint is being written, so that the process is given the time."""
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
    """Inside, the processes that `jax.distributed.initialize(**options)` brings together are one run.

    A process that fails tells the others, which end with its message; one that is gone ends them when
    `heartbeat_timeout_seconds` have passed. Messages begin with `name`. `options` are what the environment (Cloud TPU,
    GKE, SLURM, Open MPI) does not say.
    """
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=30, **options)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(
            f"{name}: the processes of the run could not come together ({error}): give --coordinator_address=HOST:PORT "
            "of process 0, --num_processes and --process_id where the environment does not say them"
        ) from None
    end = "one of the others is gone: start the same command on all of them; finished steps stay"
    _on_abort(f"{name}: aborted, as a rule because {end}")
    ended = threading.Event()

    def watch() -> None:  # it ends this process even in a collective that a failed one never joins
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
        _end_after_another(name)  # before: what this one met, such as a closed connection, is likely its consequence
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


@functools.cache  # which keeps the handler
def _on_abort(text: str) -> Any:
    """JAX aborts a process that cannot reach process 0, and others after a silence, from a thread in which no exception
    can be raised. It ends with the text and status 1 then."""

    def end(number: int) -> None:
        os.write(2, f"{text}\n".encode())
        os._exit(1)

    handler = _ABORTED(end)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    return handler


def leave(text: str) -> NoReturn:
    """End this process with status 0 when all have come to their end, whatever the devices are at."""
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    _end(text, 0)


def _end_after_another(name: str) -> None:
    """End this process where another failed, with its message. Where the store does not answer, process 0 is gone or
    all is over: JAX itself ends the process then, and says so."""
    failures: list[tuple[str, str]] = []
    with contextlib.suppress(Exception):
        failures = _store().key_value_dir_get("es_jax/failed/")
    for key, text in failures:
        if (other := key.split("/")[-1]) != str(jax.process_index()):
            _end(f"{name}: process {other} failed, so this one stops: {text}", 1)


def _end(text: str, status: int) -> NoReturn:
    """End the process at once: the devices may be at work that nobody waits for. Where one failed, process 0 ends last:
    it holds the store, without which JAX ends a process with a message of its own."""
    if status and first():
        time.sleep(8 * _POLL)
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


def _store() -> Any:
    from jax._src import distributed  # JAX has no public name for it; Orbax uses this one too

    return distributed.global_state.client


def _put(key: str, value: Any, *, overwrite: bool = False) -> None:
    _store().key_value_set_bytes(f"es_jax/{key}", zlib.compress(json.dumps(value).encode(), 1), overwrite)


def _wait(key: str) -> Any:
    while (value := _look(key, patience=_POLL)) is None:
        check()
    return value


def _look(key: str, *, patience: float = 0.0) -> Any:
    """The value of a key, or None when it is not there within `patience` seconds."""
    store, key, limit = _store(), f"es_jax/{key}", int(1000 * patience)
    try:
        value = store.blocking_key_value_get_bytes(key, limit) if limit else store.key_value_try_get_bytes(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error) or "DEADLINE_EXCEEDED" in str(error):
            return None
        raise
    return json.loads(zlib.decompress(value))
