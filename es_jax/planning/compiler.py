"""A child process for the compilers of absent devices, since these may end their process instead of answering.

A request is a line of JSON on the child's standard input. The answers are lines of JSON: what it is about to compile,
progress messages, and finally the plan, or why there is none. child.py is the child's side.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from es_jax.planning.topology import Topology

COMMAND = (sys.executable, "-m", "es_jax.planning.child")
_ROOT = str(Path(__file__).resolve().parents[2])  # the folder of the package
_FATAL = re.compile(r"^F\d{4}|Check fail|LLVM ERROR|terminate called|Error: ")  # found in a process's last output


class CompilerEnded(RuntimeError):
    """The compiler's process ended without an answer. The text names the compiler, its version, how it ended and what
    to do; a note holds the process's whole output."""


class Compiler:
    """The child process. It starts with the first request, and again with the next request after an end without an
    answer."""

    def __init__(self, command: Sequence[str] | None = None):
        self._command = command or COMMAND
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._process is None:
            return
        if kind is KeyboardInterrupt:
            self._process.kill()
        sys.stderr.write(self._end())

    def ask(self, request: Mapping[str, Any], topology: Topology, say: Callable[[str], None]) -> dict[str, Any]:
        """The plan from the answer. Raises CompilerEnded, or what the child raised: ValueError, OSError,
        RuntimeError."""
        process, work = self._process or self._start(), "started"
        assert process.stdin and process.stdout
        request = {**request, "topology": topology.shape, "slices": topology.slices}
        with contextlib.suppress(BrokenPipeError):  # it has ended: its output says how
            process.stdin.write(json.dumps(request, default=sorted) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            try:
                ((kind, value),) = json.loads(line).items()
            except (ValueError, AttributeError):  # its last line, truncated
                break
            if kind == "compiling":
                work = f"compiled {value}"
            elif kind == "said":
                say(value)
            elif kind == "plan":
                return value
            else:
                raise {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(value)
        said = self._end()
        error = CompilerEnded(_sentence(topology, process.returncode, work, said))
        error.add_note(said)
        raise error

    def _start(self) -> "subprocess.Popen[str]":
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},  # it must not use this machine's chips
        )  # fmt: skip
        return self._process

    def _end(self) -> str:
        """Wait for the child's end; returns its standard error."""
        process, self._process = self._process, None
        assert process and process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()
        with self._said as file:
            file.seek(0)
            return file.read()


def _sentence(topology: Topology, status: int, work: str, said: str) -> str:
    """A sentence: which compiler ended, how, doing what, and what to do."""
    gpu = topology.chip.kind.startswith("NVIDIA")
    package = "jax-cuda12-pjrt" if gpu else "libtpu"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = next((line for line in lines if _FATAL.search(line)), lines[-1] if lines else "without any output")
    newer = "pip install -U jax jax-cuda12-plugin jax-cuda12-pjrt" if gpu else "pip install -U libtpu"
    remedy = f"another version may compile it ({newer}), or plan other sizes, such as decode.slots or mesh.model"
    if status == -signal.SIGKILL:
        remedy = "usually the machine has too little memory for the compiler: plan on a machine with more"
    return (
        f"{package} {version}, the compiler for {topology.name}, ended with {how} and without an answer while it "
        f"{work} ({last[:200]}): {remedy}"
    )
