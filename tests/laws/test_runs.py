"""The laws of runs: a run is its config, its base weights and its seed log, and a crash loses no finished step."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from es_jax.core.mesh import make_mesh
from es_jax.core.processes import Preempted
from es_jax.rundir.checkpoints import Checkpoints, saved_steps
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import SeedLog
from es_jax.scoring.row_results import EvalsFile
from es_jax.training.config import freeze
from es_jax.training.loop import run
from es_jax.training.recorder import Recorder
from es_jax.training.state import State
from es_jax.training.weights_at import replay

STEPS = 6


def config_of(tiny_model, **groups):
    fields = {
        "model": {"source": str(tiny_model)},
        "task": {"name": "conciseness", "train_size": 3},
        "es": {"population": 6, "sigma": 0.05},
        "optim": {"learning_rate": 0.02, "anchor": {"penalty": "l2", "kappa": 1.0}},
        "decode": {"max_prompt_tokens": 160, "max_new_tokens": 4, "slots": 2},
        "train": {"steps": STEPS, "checkpoint_every": 4, "samples": 1},
        "evals": {"every": 3, "rows": 2},
    }
    for group, values in groups.items():
        fields[group] = fields.get(group, {}) | values
    return freeze(fields)


def host(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(host(a), host(b), strict=True))


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """An uninterrupted run: its config, directory and final weights."""
    workdir = tmp_path_factory.mktemp("whole")
    config = config_of(tiny_model)
    result = run(config, workdir)
    return config, workdir, host(result.params)


VARIANTS = {
    "plain": {"optim": {"anchor": {"penalty": "none"}}},
    "l1, antithetic": {"optim": {"anchor": {"penalty": "l1", "strength": 0.1}}, "es": {"antithetic": True}},
    "adam": {"optim": {"name": "adam", "anchor": {"penalty": "l2", "strength": 1.0}}},
    "shared_seed in float16": {
        "es": {"noise": "shared_seed"},
        "model": {"param_dtype": "float16"},
        "optim": {"anchor": {"penalty": "l2", "strength": 1.0}},
    },
    "lanes": {"decode": {"members_at_once": 2, "max_prompt_tokens": 160, "max_new_tokens": 4, "slots": 2}},
    "a few prompts a step": {"task": {"prompts_per_step": 2, "train_size": 3}},
    "schedules": {
        "es": {"schedule": "linear:0.5:1"},
        "optim": {"schedule": "cosine:0.1:2", "anchor": {"penalty": "l2", "strength": 5.0, "schedule": "constant::2"}},
    },
    "an averaged anchor": {"optim": {"anchor": {"penalty": "l2", "strength": 5.0, "ema_decay": 0.5}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_equals_the_live_weights_bit_for_bit(variant, tiny_model, tmp_path):
    groups = VARIANTS[variant] | {"train": {"steps": 3, "checkpoint_every": 50}, "evals": {"every": 0}}
    groups["model"] = {"source": str(tiny_model)} | VARIANTS[variant].get("model", {})
    standard = jax.numpy_dtype_promotion("standard" if variant == "adam" else "strict")  # optax's adam needs it
    with standard:
        result = run(config_of(tiny_model, **groups), tmp_path)
        rebuilt = dict((step, host(params)) for step, params in replay(tmp_path))
    assert sorted(rebuilt) == [0, 1, 2, 3]
    assert same(rebuilt[3], result.params)
    assert not same(rebuilt[2], result.params)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_replay_has_the_same_bits_on_any_mesh(devices, whole):
    _, workdir, final = whole
    mesh = make_mesh(devices=jax.devices()[:devices])
    ((step, params),) = replay(workdir, steps=[STEPS], mesh=mesh)
    assert step == STEPS and same(params, final)


def test_replay_needs_only_config_and_seed_log(whole, tmp_path):
    _, workdir, final = whole
    for name in ("config.json", "seedlog.jsonl"):
        shutil.copy(workdir / name, tmp_path / name)
    rebuilt = {step: host(params) for step, params in replay(tmp_path, steps=[STEPS, 0])}
    assert same(rebuilt[STEPS], final) and sorted(os.listdir(tmp_path)) == ["config.json", "seedlog.jsonl"]


class Killed(BaseException):
    """What no code of ours may catch, as little as it could catch SIGKILL."""


def check_resumed(config, workdir, whole):
    """Go on with a run that was killed; in the end it must be the run that never was."""
    _, uninterrupted, final = whole
    result = run(config, workdir)
    assert same(result.params, final)
    assert (workdir / "seedlog.jsonl").read_bytes() == (uninterrupted / "seedlog.jsonl").read_bytes()
    exact = ("step", "reward_mean", "reward_std", "drift", "drift_theory", "tokens", "length", "truncated")
    for name in ("metrics.jsonl", "samples.jsonl", "evals/conciseness.jsonl"):
        ours, theirs = read_jsonl(workdir / name), read_jsonl(uninterrupted / name)
        keep = exact if name == "metrics.jsonl" else theirs[0]
        assert [{k: row[k] for k in keep} for row in ours] == [{k: row[k] for k in keep} for row in theirs]
    assert (workdir / "DONE").exists()


POINTS = {
    "before the update": (State, "apply", "before"),
    "after the update": (State, "apply", "after"),
    "before the metrics": (Recorder, "step", "before"),
    "before the seed log": (SeedLog, "append", "before"),
    "after the seed log": (SeedLog, "append", "after"),
    "before a checkpoint": (Checkpoints, "save", "before"),
    "after a checkpoint": (Checkpoints, "save", "after"),
    "before an evaluation is written": (EvalsFile, "add", "before"),
    "after an evaluation is written": (EvalsFile, "add", "after"),
}


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_and_resumed_equals_uninterrupted(point, call, whole, tmp_path, monkeypatch):
    owner, name, when = POINTS[point]
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if when == "before" and len(calls) == call:
            raise Killed
        out = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return out

    config = whole[0]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run(config, tmp_path)
    check_resumed(config, tmp_path, whole)


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
    assert saved_steps(tmp_path) == [len(SeedLog(tmp_path, writable=False).entries)]
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


def test_a_seed_gives_the_same_run_twice_and_another_seed_another(whole, tiny_model, tmp_path):
    config, workdir, _ = whole
    again = tmp_path / "again"
    run(config, again)
    assert (again / "seedlog.jsonl").read_bytes() == (workdir / "seedlog.jsonl").read_bytes()
    train = dataclasses.replace(config.train, seed=1, steps=1)
    run(dataclasses.replace(config, train=train), tmp_path / "other")
    ours, theirs = (SeedLog(folder, writable=False).entries[0] for folder in (tmp_path / "other", workdir))
    assert ours.seeds != theirs.seeds and ours.weights != theirs.weights


def test_resuming_with_schedules_equals_uninterrupted(tiny_model, tmp_path, monkeypatch):
    """The rates of each step stand in the log, so the steps since the checkpoint are rebuilt as they were."""
    optim = {
        "schedule": "linear:0.1:2",
        "anchor": {"penalty": "l2", "strength": 5.0, "ema_decay": 0.8, "schedule": "cosine"},
    }
    config = config_of(tiny_model, optim=optim, es={"schedule": "cosine:0.5"}, evals={"every": 0})
    uninterrupted = run(config, tmp_path / "whole")
    final, calls, original = host(uninterrupted.params), [], SeedLog.append

    def dying(self, entry):
        original(self, entry)
        calls.append(1)
        if len(calls) == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SeedLog, "append", dying)
        with pytest.raises(Killed):
            run(config, tmp_path / "killed")
    assert same(run(config, tmp_path / "killed").params, final)
    logs = [(tmp_path / name / "seedlog.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    entries = SeedLog(tmp_path / "whole", writable=False).entries
    assert [round(e.learning_rate / 0.02, 3) for e in entries] == [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]
    assert entries[0].sigma > entries[-1].sigma == pytest.approx(0.025)
    content = json.loads((tmp_path / "whole/config.json").read_text())
    content["config"]["optim"]["schedule"] = "constant"  # the log, not the schedule, says what the steps were
    (tmp_path / "whole/config.json").write_text(json.dumps(content))
    ((_, rebuilt),) = replay(tmp_path / "whole", steps=[STEPS])
    assert same(rebuilt, final)


def test_a_run_may_be_pulled_to_another_model_than_it_starts_from(whole, tiny_model, tmp_path):
    """The second of two tasks: it starts where the first ended and is pulled to where the first began."""
    from es_jax.evals.export_step import export_run

    export_run(whole[1], tmp_path / "first")
    anchor = {"penalty": "l2", "strength": 20.0, "kappa": None, "source": str(tiny_model)}
    config = config_of(tmp_path / "first", optim={"anchor": anchor}, train={"seed": 7}, evals={"every": 0})
    final = host(run(config, tmp_path / "second").params)
    ((_, rebuilt),) = replay(tmp_path / "second", steps=[STEPS])
    assert same(rebuilt, final)
    rows = read_jsonl(tmp_path / "second/metrics.jsonl")
    assert rows[-1]["drift"] == pytest.approx(rows[-1]["drift_theory"], rel=0.05)
    with pytest.raises(ValueError, match="anchor_digest was"):
        content = json.loads((tmp_path / "second/config.json").read_text())
        (tmp_path / "second/config.json").write_text(json.dumps(content | {"anchor_digest": "0"}))
        run(config, tmp_path / "second")


def test_live_diagnostics_are_in_the_metrics(whole):
    rows = read_jsonl(whole[1] / "metrics.jsonl")
    for row in rows:
        assert row["kappa"] == pytest.approx(row["drift"] / (8_000**0.5 * 0.05), rel=0.2)
        assert row["expected_gain"] >= 0 and 0 <= row["tied_members"] <= 1 and row["linear_to_curvature"] is None
        assert row["expected_gain"] == pytest.approx(0.02 / 0.05 * row["reward_std"], rel=1e-3, abs=1e-6)
    assert [row["step"] for row in rows if row["curvature_gap"] is not None] == [1, 4]  # behind evaluations at 0, 3, 6


def test_drift_is_what_theory_says(whole):
    rows = read_jsonl(whole[1] / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["drift"] == pytest.approx(row["drift_theory"], rel=0.03)  # 8 thousand weights: 1/√(2d) = 0.8 %


def test_nothing_compiles_after_the_first_step(tiny_model, tmp_path, caplog):
    config = config_of(tiny_model, es={"population": 10, "sigma": 0.04}, train={"steps": 3, "checkpoint_every": 1})
    seen, original = [], Recorder.step

    def counting(self, entry, *args, **kwargs):
        seen.append(len([r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]))
        return original(self, entry, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, jax.log_compiles(True), caplog.at_level(logging.WARNING):
        patch.setattr(Recorder, "step", counting)
        run(config, tmp_path)
    assert len(seen) == 3 and seen[0] > 0
    assert seen[2] == seen[1]  # the first checkpoint and evaluation lie between the first two


def test_a_directory_of_another_run_is_refused(whole, tiny_model, tmp_path):
    config, workdir, _ = whole
    es = dataclasses.replace(config.es, sigma=0.5)
    with pytest.raises(ValueError, match=r"es\.sigma was 0\.05 and is 0\.5"):
        run(dataclasses.replace(config, es=es), workdir)
    with pytest.raises(ValueError, match=r"train\.steps is 2 but .* has 6 finished steps"):
        run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), workdir)
    with pytest.raises(ValueError, match="rows was"):
        longer = dataclasses.replace(config.evals, rows=3)
        changed = dataclasses.replace(config, evals=longer)
        content = json.loads((workdir / "config.json").read_text())
        shutil.copytree(workdir, tmp_path / "rows")
        content["config"]["evals"]["rows"] = 3
        (tmp_path / "rows/config.json").write_text(json.dumps(content))
        run(changed, tmp_path / "rows")
    shutil.copytree(workdir, tmp_path / "run")
    content = json.loads((tmp_path / "run/config.json").read_text()) | {"digest": "0" * 64}
    (tmp_path / "run/config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="digest was '000000000000"):
        run(config, tmp_path / "run")
    with pytest.raises(ValueError, match="digests differ"):
        next(replay(tmp_path / "run"))


def test_a_directory_without_a_finished_step_may_be_taken_over(whole, tmp_path, monkeypatch):
    """A first try that ended before its first step, out of memory say, does not pin the directory to its config."""
    config = whole[0]
    with monkeypatch.context() as patch:
        patch.setattr(State, "apply", lambda *a: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            es = dataclasses.replace(config.es, sigma=0.07)
            run(dataclasses.replace(config, es=es), tmp_path)
    assert (tmp_path / "evals/conciseness.jsonl").exists()
    check_resumed(config, tmp_path, whole)


def test_other_tasks_are_evaluated_beside_the_one_trained(tiny_model, tmp_path):
    evals = {"every": 1, "rows": 3, "tasks": ("lab-add", "lab-compare")}
    config = config_of(tiny_model, train={"steps": 1, "checkpoint_every": 5}, evals=evals)
    run(config, tmp_path)
    for name in ("conciseness", "lab-add", "lab-compare"):
        rows = read_jsonl(tmp_path / "evals" / f"{name}.jsonl")
        assert [(row["step"], row["n"]) for row in rows] == [(0, 3), (1, 3)]
    run(config, tmp_path)  # config.json holds lists for tuples, and still is this run's


def test_random_rewards_walk_as_far_as_real_ones(tiny_model, whole, tmp_path):
    es = {"population": 6, "sigma": 0.05, "rewards": "random"}
    run(config_of(tiny_model, es=es), tmp_path)
    ours, theirs = (read_jsonl(folder / "metrics.jsonl")[-1] for folder in (tmp_path, whole[1]))
    assert ours["drift_theory"] == pytest.approx(theirs["drift_theory"], rel=1e-4)
    assert ours["drift"] == pytest.approx(theirs["drift"], rel=0.03)
    assert ours["reward_mean"] != theirs["reward_mean"]


def test_optimizer_state_is_cut_over_the_devices_like_the_weights(tiny_model):
    from es_jax.training.state import load_base

    optim = {"name": "adam", "anchor": {"penalty": "l2", "strength": 1.0}}
    config, mesh = config_of(tiny_model, optim=optim), make_mesh()
    params = load_base(config, mesh).params
    state = State(config, mesh, params)
    where = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
    held = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(held) == 3 * len(jax.tree.leaves(params))  # two moments and the anchor
    assert all(leaf.sharding.is_equivalent_to(where[leaf.shape], leaf.ndim) for leaf in held)
    assert any(not sharding.is_fully_replicated for sharding in where.values())


def test_two_processes_cannot_train_in_one_directory(whole):
    from es_jax.rundir.directory import claim

    config, workdir, _ = whole
    with claim(workdir), pytest.raises(OSError, match="in use by another process"):
        run(config, workdir)


def test_damaged_logs_are_named(whole, tmp_path):
    config, workdir, _ = whole
    shutil.copytree(workdir, tmp_path / "run")
    log = tmp_path / "run" / "seedlog.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"{broken\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"seedlog\.jsonl line 2 cannot be read"):
        run(config, tmp_path / "run")
    log.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is step 3"):
        run(config, tmp_path / "run")
    log.write_bytes(lines[0])
    with pytest.raises(ValueError, match=r"checkpoint of step 6, but its seed log ends at step 1"):
        run(config, tmp_path / "run")
    with pytest.raises(ValueError, match="holds steps 0 to 1"):
        list(replay(tmp_path / "run", steps=[2]))
