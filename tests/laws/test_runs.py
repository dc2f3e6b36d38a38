"""The laws of runs: their metrics, their evaluations, and which directories are refused."""

import dataclasses
import logging
import shutil

import jax
import pytest

from es_jax.core.mesh import make_mesh
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import read_entries
from es_jax.training.loop import run
from es_jax.training.recorder import Recorder
from es_jax.training.state import State
from es_jax.training.weights_at import replay
from tests.helpers import STEPS, config_of, edit_config, host, same


def test_a_seed_gives_the_same_run_twice_and_another_seed_another(whole, tiny_model, tmp_path):
    config, workdir, _ = whole
    again = tmp_path / "again"
    run(config, again)
    assert (again / "seedlog.jsonl").read_bytes() == (workdir / "seedlog.jsonl").read_bytes()
    train = dataclasses.replace(config.train, seed=1, steps=1)
    run(dataclasses.replace(config, train=train), tmp_path / "other")
    ours, theirs = (read_entries(folder)[0] for folder in (tmp_path / "other", workdir))
    assert ours.seeds != theirs.seeds and ours.weights != theirs.weights


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
        edit_config(tmp_path / "second", anchor_digest="0")
        run(config, tmp_path / "second")
    with pytest.raises(ValueError, match=r"optim\.anchor\.source .* digests differ"):
        next(replay(tmp_path / "second", steps=[1]))


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
        shutil.copytree(workdir, tmp_path / "rows")
        edit_config(tmp_path / "rows", evals={"rows": 3})
        run(changed, tmp_path / "rows")
    shutil.copytree(workdir, tmp_path / "run")
    edit_config(tmp_path / "run", digest="0" * 64)
    with pytest.raises(ValueError, match="digest was '000000000000"):
        run(config, tmp_path / "run")
    with pytest.raises(ValueError, match="digests differ"):
        next(replay(tmp_path / "run"))


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
    assert ours["drift_theory"] > theirs["drift_theory"] * (1 - 1e-4)  # real rewards may be all equal: no step
    ratios = [row["drift"] / row["drift_theory"] for row in (ours, theirs)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.03)
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
    with pytest.raises(ValueError, match="has only steps 0 to 1"):
        list(replay(tmp_path / "run", steps=[2]))
