"""A pod in small: two processes on loopback, four devices each, that train, stop, resume, fail and die together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs.lab import get_config
from es_jax.core.mesh import make_mesh
from es_jax.core.tree import named_leaves
from es_jax.training.checkpoint import saved_steps
from es_jax.training.export import export_run
from es_jax.training.loop import run
from es_jax.training.metrics import read_jsonl
from es_jax.training.seedlog import SeedLog
from es_jax.training.state import replay
from es_jax.weights.model import load_model

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "model.source": "lab",
    "task.name": "lab-countdown",
    "task.train_size": 8,
    "task.prompts_per_step": 8,
    "es.population": 6,
    "es.sigma": 0.01,
    "optim.learning_rate": 0.005,
    "optim.anchor.penalty": "l2",
    "optim.anchor.drift": 1.0,
    "decode.max_prompt": 16,
    "decode.max_new": 6,
    "decode.slots": 8,
    "decode.members_at_once": 1,  # so that each process has members to grade
    "train.steps": 5,
    "train.checkpoint_every": 1000,
    "evals.every": 5,
    "evals.size": 20,
    "mesh.pop": 4,
    "mesh.model": 2,
}


timed = pytest.mark.skipif(
    not os.environ.get("ES_JAX_PROCESSES"),
    reason="rests on how fast processes start and die, so it fails at times on a busy machine: ES_JAX_PROCESSES=1",
)


class Pair:
    """Two processes of one run, started."""

    def __init__(self, workdir, cache, *, steps, **env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        fields = FIELDS | {"train.steps": steps}
        command = [sys.executable, "-m", "tests.laws.train_process", f"--config={ROOT}/configs/lab.py"]
        command += [f"--workdir={workdir}", f"--coordinator_address={address}", "--num_processes=2"]
        command += ["--heartbeat_timeout=20", *(f"--config.{name}={value}" for name, value in fields.items())]
        env = os.environ | env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": env}
        self.log = workdir / "seedlog.jsonl"
        self.started = [subprocess.Popen([*command, f"--process_id={rank}"], **pipes) for rank in range(2)]

    def until(self, step):
        """Wait for the log to hold a step."""
        for _ in range(2400):
            if self.log.exists() and self.log.read_bytes().count(b"\n") >= step:
                return
            if any(process.poll() is not None for process in self.started):
                break
            time.sleep(0.1)
        raise AssertionError(self.ended())

    def ended(self, timeout=240):
        """Status and output of both; what does not end is killed."""
        try:
            out = [process.communicate(timeout=timeout)[0] for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        return [process.returncode for process in self.started], out


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """The directory of a run of five steps in two processes."""
    workdir = tmp_path_factory.mktemp("pair")
    status, out = Pair(workdir, cache, steps=5).ended()
    assert status == [0, 0], out
    assert "finished step 5" in out[0] and "finished step 5" not in out[1]
    return workdir


def config_of(steps):
    config = get_config()
    config.update_from_flattened_dict(FIELDS | {"train.steps": steps})
    return config


@pytest.mark.slow
def test_two_processes_leave_what_one_does(trained, tmp_path):
    result = run(config_of(5), tmp_path)
    assert (tmp_path / "seedlog.jsonl").read_bytes() == (trained / "seedlog.jsonl").read_bytes()
    assert len({tuple(entry.rewards) for entry in SeedLog(trained, writable=False).entries}) > 1
    ours, theirs = (read_jsonl(folder / "evals/lab-countdown.jsonl") for folder in (tmp_path, trained))
    assert ours == theirs and [row["step"] for row in theirs] == [0, 5]
    for ours, theirs in zip(*(read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path, trained)), strict=True):
        assert ours["drift"] == pytest.approx(theirs["drift"], rel=1e-6)  # its sum over devices has no order
        kept = [name for name in ours if name != "drift" and "second" not in name and "share_" not in name]
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    assert read_jsonl(tmp_path / "samples.jsonl") == read_jsonl(trained / "samples.jsonl")
    ((_, params),) = replay(trained, steps=[5], mesh=make_mesh(1))
    replayed = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
    export_run(trained, tmp_path / "out")  # from the checkpoint that both wrote
    for exported in (load_model(tmp_path / "out").params, result.params):
        for name, leaf in named_leaves(exported):
            np.testing.assert_array_equal(leaf, replayed[name], err_msg=name)


@timed
@pytest.mark.slow
def test_terminated_resumed_and_killed(trained, cache):
    pair = Pair(trained, cache, steps=100000)
    pair.until(7)
    began = time.monotonic()
    pair.started[1].send_signal(signal.SIGTERM)
    status, out = pair.ended()
    assert status == [0, 0] and time.monotonic() - began < 30, out
    step = len(SeedLog(trained, writable=False).entries)
    assert all(f"terminated; step {step} is saved" in text for text in out), out
    assert saved_steps(trained)[-1] == step >= 7
    pair = Pair(trained, cache, steps=100000)
    pair.until(step + 2)
    pair.started[1].kill()
    (status, _), (out, _) = pair.ended()
    assert status != 0 and ("process 1" in out or "task 1" in out or "Connection" in out or "closed" in out), out
    before = SeedLog(trained, writable=False).entries
    result = run(config_of(len(before) + 1), trained)  # one process goes on where two stopped
    assert result.step == len(before) + 1


@timed
@pytest.mark.slow
def test_a_process_that_fails_tells_the_other(tmp_path, cache):
    status, out = Pair(tmp_path, cache, steps=5, FAIL_AT="1 2").ended()
    assert status == [1, 1], out
    assert "es_jax.train: the grader broke" in out[1]
    assert "es_jax.train: process 1 failed, so this one stops: es_jax.train: the grader broke" in out[0]
    assert len(SeedLog(tmp_path, writable=False).entries) == 1


def test_a_process_that_cannot_listen_ends_all_the_same():
    code = """
import time
from es_jax.core import hosts
hosts.GRACE = 0.2
with hosts.stoppable():
    print("ready", flush=True)
    time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "finished steps are in the seed log" in err


def test_one_process_of_several_needs_to_know_the_others():
    command = [
        sys.executable,
        "-m",
        "es_jax.train",
        f"--config={ROOT}/configs/lab.py",
        "--workdir=x",
        "--num_processes=2",
    ]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 1 and "--coordinator_address=HOST:PORT" in out.stderr and "Traceback" not in out.stderr
