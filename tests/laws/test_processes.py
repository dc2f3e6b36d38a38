"""A pod in small: two processes on loopback, four devices each, that train, stop, resume, fail and die together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.lab import get_config
from es_jax.core.mesh import make_mesh
from es_jax.core.tree import named_leaves
from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.rundir.checkpoints import saved_steps
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import read_entries
from es_jax.tasks.reasoning_gym_scorers import VERSION
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from es_jax.weights.model import load_model
from tests import reasoning_gym_stub

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
    "optim.anchor.kappa": 1.0,
    "decode.max_prompt_tokens": 16,
    "decode.max_new_tokens": 6,
    "decode.slots": 8,
    "decode.members_at_once": 1,  # so that each process has members to grade
    "train.steps": 5,
    "train.checkpoint_every": 1000,
    "evals.every": 5,
    "evals.rows": 20,
    "mesh.groups": 4,
    "mesh.model": 2,
}
# What is said of a process that was killed: by its connections as they close, or by JAX when heartbeats are missed.
GONE = re.compile(r"Connection|closed|tasks are unhealthy[^:]*:\s*1\b")


class Pair:
    """Two processes of one command, started."""

    def __init__(self, workdir, cache, *command, silence=120, **env):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", *command, f"--workdir={workdir}", f"--coordinator_address={address}"]
        command += ["--num_processes=2", f"--heartbeat_timeout={silence}"]
        env = os.environ | env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.log, self.started, self.out = workdir / "seedlog.jsonl", [], []
        for rank in range(2):
            self.out.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - a pipe that nobody reads would fill up
            pipes = {"stdout": self.out[-1], "stderr": subprocess.STDOUT, "cwd": ROOT, "env": env}
            self.started.append(subprocess.Popen([*command, f"--process_id={rank}"], **pipes))

    @classmethod
    def training(cls, workdir, cache, *, steps, config="lab.py", fields=FIELDS, **env):
        """Of training, for so many steps."""
        fields = (f"--config.{name}={value}" for name, value in (fields | {"train.steps": steps}).items())
        return cls(workdir, cache, "tests.laws.train_process", f"--config={ROOT}/configs/{config}", *fields, **env)

    def until(self, step):
        """Wait for the log to hold a step."""
        for _ in range(2400):
            if self.log.exists() and self.log.read_bytes().count(b"\n") >= step:
                return
            if any(process.poll() is not None for process in self.started):
                break
            time.sleep(0.1)
        raise AssertionError("\n".join(self.ended()[1]))

    def ended(self, timeout=240):
        """Status and output of both; what does not end is killed."""
        end = time.monotonic() + timeout
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0))
        for process in self.started:
            process.kill()
        out = []
        for file in self.out:
            with file:
                file.seek(0)
                out.append(file.read())
        return [process.wait() for process in self.started], out


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """The directory of a run of five steps in two processes, each of which has one more that scores."""
    workdir = tmp_path_factory.mktemp("pair")
    status, out = Pair.training(workdir, cache, steps=5, WORKERS="1").ended()
    assert status == [0, 0], "\n".join(out)
    assert "finished step 5" in out[0] and "finished step 5" not in out[1]
    return workdir


def config_of(steps, argument="", fields=FIELDS):
    config = get_config(argument)
    config.update_from_flattened_dict(fields | {"train.steps": steps})
    return config


@pytest.mark.slow
def test_two_processes_leave_what_one_does(trained, tmp_path):
    result = run(config_of(5), tmp_path)
    assert (tmp_path / "seedlog.jsonl").read_bytes() == (trained / "seedlog.jsonl").read_bytes()
    assert len({tuple(entry.rewards) for entry in read_entries(trained)}) > 1
    ours, theirs = (read_jsonl(folder / "evals/lab-countdown.jsonl") for folder in (tmp_path, trained))
    assert ours == theirs and [row["step"] for row in theirs] == [0, 5]
    for ours, theirs in zip(*(read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path, trained)), strict=True):
        for name in ("drift", "kappa"):  # the sum over devices has no order
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
        kept = [
            name for name in ours if name not in ("drift", "kappa") and "second" not in name and "share_" not in name
        ]
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    assert read_jsonl(tmp_path / "samples.jsonl") == read_jsonl(trained / "samples.jsonl")
    ((_, params),) = replay(trained, steps=[5], mesh=make_mesh(1))
    replayed = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
    export_run(trained, tmp_path / "out")  # from the checkpoint that both wrote
    for exported in (load_model(tmp_path / "out").params, result.params):
        for name, leaf in named_leaves(exported):
            np.testing.assert_array_equal(leaf, replayed[name], err_msg=name)


OWN_TASK = """
import os
from es_jax import Score, SimpleTask

class Ones(SimpleTask):
    def __init__(self, size):
        self.size, self.parent = size, os.getpid()

    def rows(self, split):
        return [(f"R1{i:04}=", None) for i in range(self.size)]

    def score(self, example, completion):
        return Score(float(completion.count("1")), {"worker": float(os.getpid() != self.parent)})
"""


@pytest.mark.slow
def test_two_processes_train_on_a_task_of_a_file(cache, tmp_path):
    """Each has a worker that scores, for there is a timeout; one process without leaves the same log."""
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    fields = FIELDS | {"task.name": f"{tmp_path}/own_task.py:Ones", "task.options.size": 20}
    limit = {"task.timeout_seconds": 60.0}
    status, out = Pair.training(tmp_path / "pair", cache, steps=2, fields=fields | limit).ended()
    assert status == [0, 0], "\n".join(out)
    run(config_of(2, fields=fields), tmp_path / "one")
    assert (tmp_path / "one/seedlog.jsonl").read_bytes() == (tmp_path / "pair/seedlog.jsonl").read_bytes()
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("pair", "one")]
    assert [[row["worker"] for row in of_run] for of_run in rows] == [[1.0, 1.0], [0.0, 0.0]]
    assert len({row["reward_std"] for row in rows[0]} | {0.0}) > 1
    evals = [read_jsonl(tmp_path / name / "evals/own_task.Ones.jsonl") for name in ("pair", "one")]
    assert [row["reward"] for row in evals[0]] == [row["reward"] for row in evals[1]] and len(evals[0]) == 2


@pytest.mark.slow
def test_two_processes_have_the_rows_that_the_first_keeps(cache, tmp_path):
    site = reasoning_gym_stub.write(tmp_path / "site", VERSION)
    fields = FIELDS | {"task.name": "reasoning_gym:chain_sum", "task.options.max_terms": 2, "evals.every": 0}
    fields |= {"task.prompt": "{question}", "es.population": 4}
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    status, out = Pair.training(tmp_path / "pair", cache, steps=1, fields=fields, PYTHONPATH=path).ended()
    assert status == [0, 0], "\n".join(out)
    rows = (tmp_path / "pair/tasks/reasoning_gym.chain_sum.train.jsonl").read_text().splitlines()[1:]
    assert len(rows) == 8 and '"prompt": "' in rows[0]


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(trained, cache, tmp_path):
    """A replayed step and one that has a checkpoint; sums over devices have no order, so theirs may differ a little."""
    ask = ["--tasks=lab-countdown,lab-add", "--steps=3,5", "--kl", "--drift", "--rows=20", "--kl_tokens=4"]
    status, out = Pair(trained, cache, "es_jax.evaluate", *ask, f"--out={tmp_path}/two").ended()
    assert status == [0, 0] and "rows in" in out[0] and "rows in" not in out[1], "\n".join(out)
    options, tasks = Options(rows=20, kl_tokens=4), ["lab-countdown", "lab-add"]
    evaluate_run(trained, tasks=tasks, steps=[3, 5], kl=True, drift=True, out=tmp_path / "one", options=options)
    for name in ("lab-countdown.jsonl", "lab-add.jsonl", "verdicts/lab-add.jsonl", "continuations/lab-add.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for name in ("kl", "drift"):
        ours, theirs = (read_jsonl(tmp_path / of / f"{name}.jsonl") for of in ("one", "two"))
        assert len(ours) == len(theirs) == (4 if name == "kl" else 2)
        for one, two in zip(ours, theirs, strict=True):
            assert one["step"] == two["step"]
            numbers = [key for key, value in one.items() if isinstance(value, float)]
            assert [one[key] for key in numbers] == pytest.approx([two[key] for key in numbers], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_deal_what_one_does(cache, tmp_path):
    """Members that share their weights and see four of eight prompts, each of which three members see."""
    fields = FIELDS | {"es.noise": "low_rank", "es.prompts_per_member": 4, "evals.every": 0, "decode.slots": 4}
    status, out = Pair.training(tmp_path / "two", cache, steps=2, fields=fields).ended()
    assert status == [0, 0], "\n".join(out)
    result = run(config_of(2, fields=fields), tmp_path / "one")
    logs = [(tmp_path / name / "seedlog.jsonl").read_bytes() for name in ("one", "two")]
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 2
    ((_, replayed),) = replay(tmp_path / "two", steps=[2], mesh=make_mesh(1))
    for (name, ours), (_, theirs) in zip(named_leaves(result.params), named_leaves(replayed), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


GRPO = {name: value for name, value in FIELDS.items() if not name.startswith(("es.", "optim."))} | {
    "grpo.rollouts": 4,
    "grpo.mini_batch": 4,
    "grpo.micro_batch": 2,
    "optim.learning_rate": 1e-3,
    "decode.slots": 1,  # so that a step takes two calls
    "evals.every": 0,
}


@pytest.mark.slow
def test_two_processes_of_grpo_do_what_one_does(cache, tmp_path):
    """The gradient is a sum over devices in another order, so what follows from it is bounded and not the same."""
    status, out = Pair.training(tmp_path / "two", cache, steps=2, config="lab.py:grpo", fields=GRPO).ended()
    assert status == [0, 0] and "finished step 2" in out[0], "\n".join(out)
    with jax.numpy_dtype_promotion("standard"):  # optax's adamw needs it
        result = run(config_of(2, "grpo", GRPO), tmp_path / "one")
    for name in ("seedlog.jsonl", "samples.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    ours, theirs = (read_jsonl(tmp_path / of / "metrics.jsonl") for of in ("one", "two"))
    for one, two in zip(ours, theirs, strict=True):
        for name in ("reward_mean", "tokens", "loss", "kl", "entropy", "ratio", "gradient_norm", "drift"):
            assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-6), name
    ((_, params),) = replay(tmp_path / "two", steps=[2], mesh=make_mesh(4, 2))
    moved = [float(abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (params, result.params)), strict=True)]
    assert max(moved) < 1e-5  # measured: 3.4e-7


@pytest.mark.slow
def test_terminated_resumed_and_killed(trained, cache):
    pair = Pair.training(trained, cache, steps=100000)
    pair.until(7)
    began = time.monotonic()
    pair.started[1].send_signal(signal.SIGTERM)
    status, out = pair.ended()
    assert status == [0, 0] and time.monotonic() - began < 30, "\n".join(out)
    step = len(read_entries(trained))
    assert all(f"terminated; step {step} is saved" in text for text in out), "\n".join(out)
    assert saved_steps(trained)[-1] == step >= 7
    pair = Pair.training(trained, cache, steps=100000, silence=20)
    pair.until(step + 2)
    pair.started[1].kill()
    (status, _), (out, _) = pair.ended()
    assert status != 0 and GONE.search(out), out
    before = read_entries(trained)
    result = run(config_of(len(before) + 1), trained)  # one process goes on where two stopped
    assert result.step == len(before) + 1


@pytest.mark.slow
def test_a_process_that_fails_tells_the_other(tmp_path, cache):
    status, out = Pair.training(tmp_path, cache, steps=5, FAIL_AT="1 2").ended()
    assert status == [1, 1], "\n".join(out)
    assert "es_jax.train: the grader broke" in out[1]
    assert "es_jax.train: process 1 failed, so this process stops: es_jax.train: the grader broke" in out[0]
    assert len(read_entries(tmp_path)) == 1


@pytest.mark.slow
def test_weights_that_are_not_finite_end_both(tmp_path, cache):
    fields = {name: value for name, value in FIELDS.items() if "anchor" not in name} | {"optim.learning_rate": 1e38}
    status, out = Pair.training(tmp_path, cache, steps=5, fields=fields).ended()
    assert status == [1, 1], "\n".join(out)
    assert all("step 1: its weights are NaN, infinite or too large to be squared in embed/" in text for text in out), (
        out
    )
    assert not read_entries(tmp_path) and not saved_steps(tmp_path)


def test_one_terminated_before_its_first_step_starts_anew(tmp_path):
    command = [sys.executable, "-m", "es_jax.train", f"--config={ROOT}/configs/lab.py:steps=5", f"--workdir={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert any("90,432 weights" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)  # the first step is compiling
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "terminated; no step is finished, and the same command starts again" in err
    assert not (tmp_path / "DONE").exists() and not saved_steps(tmp_path)


def test_a_process_that_cannot_listen_ends_all_the_same():
    code = """
import time
from es_jax.core import processes
processes.GRACE = 0.2
with processes.stoppable():
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
