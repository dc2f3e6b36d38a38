"""The laws of resuming: what a signal, another process, another mesh or half a line leaves is gone on with."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from es_jax.core.processes import Preempted
from es_jax.rundir.checkpoints import saved_steps
from es_jax.rundir.seed_log import SeedLog, read_entries
from es_jax.training.loop import run
from es_jax.training.state import State
from es_jax.training.weights_at import replay
from tests.helpers import STEPS, check_resumed, config_of, edit_config, host, killed, same


def test_a_half_written_line_is_no_finished_step(whole, tmp_path):
    config, workdir, _ = whole
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ckpt")
    log = tmp_path / "run" / "seedlog.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    (tmp_path / "run" / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes()[:-9])
    check_resumed(config, tmp_path / "run", whole)


@pytest.mark.slow
def test_sigkill_and_another_process(whole, tmp_path):
    """The real thing: kill -9 in the middle of a step, and a new process."""
    config, _, _ = whole
    script = (
        "import sys, json, os\n"
        "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'\n"
        "from es_jax.training.config import freeze\nfrom es_jax.training.loop import run\n"
        "run(freeze(json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, json.dumps(dataclasses.asdict(config)), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = tmp_path / "seedlog.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    check_resumed(config, tmp_path, whole)


def test_sigterm_saves_the_last_finished_step(whole, tmp_path, monkeypatch):
    append = SeedLog.append

    def terminated(self, entry):
        append(self, entry)
        if entry.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match=r"terminated; step [23] is saved"):
        patch.setattr(SeedLog, "append", terminated)
        run(whole[0], tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "DONE").exists()
    assert saved_steps(tmp_path) == [len(read_entries(tmp_path))]
    check_resumed(whole[0], tmp_path, whole)


def test_resumed_on_another_mesh(whole, tmp_path, monkeypatch):
    config, _, final = whole
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    run(shorter, tmp_path)
    other = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, groups=4))
    assert same(run(other, tmp_path).params, final)


def test_a_finished_run_started_again_does_nothing(whole, monkeypatch):
    config, workdir, final = whole
    before = (workdir / "seedlog.jsonl").read_bytes()
    monkeypatch.setattr(State, "apply", None)
    result = run(config, workdir)
    assert same(result.params, final) and result.heldout["step"] == STEPS
    assert (workdir / "seedlog.jsonl").read_bytes() == before


def test_resuming_with_schedules_equals_uninterrupted(tiny_model, tmp_path):
    """The rates of each step stand in the log, so the steps since the checkpoint are rebuilt as they were."""
    optim = {
        "schedule": "linear:0.1:2",
        "anchor": {"penalty": "l2", "strength": 5.0, "ema_decay": 0.8, "schedule": "cosine"},
    }
    config = config_of(tiny_model, optim=optim, es={"schedule": "cosine:0.5"}, evals={"every": 0})
    uninterrupted = run(config, tmp_path / "whole")
    final = host(uninterrupted.params)
    with killed(SeedLog, "append", call=5):
        run(config, tmp_path / "killed")
    assert same(run(config, tmp_path / "killed").params, final)
    logs = [(tmp_path / name / "seedlog.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    entries = read_entries(tmp_path / "whole")
    assert [round(e.learning_rate / 0.02, 3) for e in entries] == [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]
    assert entries[0].sigma > entries[-1].sigma == pytest.approx(0.025)
    edit_config(tmp_path / "whole", optim={"schedule": "constant"})  # the log says what the steps were
    ((_, rebuilt),) = replay(tmp_path / "whole", steps=[STEPS])
    assert same(rebuilt, final)


def test_a_directory_without_a_finished_step_may_be_taken_over(whole, tmp_path):
    """A first try that ended before its first step, out of memory say, does not pin the directory to its config."""
    config = whole[0]
    with killed(State, "apply", call=1, when="before"):
        run(dataclasses.replace(config, es=dataclasses.replace(config.es, sigma=0.07)), tmp_path)
    assert (tmp_path / "evals/conciseness.jsonl").exists()
    check_resumed(config, tmp_path, whole)
