"""The laws of runs whose members share their weights, and of runs whose members see a few prompts each."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import conciseness, lab
from es_jax.core import rng
from es_jax.core.mesh import make_mesh
from es_jax.core.tree import map_named, named_leaves
from es_jax.es import theory
from es_jax.es.population import Population
from es_jax.es.shaping import SHAPINGS, centred_on_prompts, z_score
from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.report import write_report
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import Entry, SeedLog, read_entries
from es_jax.tasks.conciseness import Conciseness
from es_jax.tasks.task import Score
from es_jax.training import loop
from es_jax.training.config import freeze, read_config
from es_jax.training.loop import run
from es_jax.training.predicted_drift import PredictedDrift
from es_jax.training.state import State, load_base, make_noise, perturbed_count
from es_jax.training.weights_at import replay
from es_jax.weights.model import load_model, save_model
from tests.helpers import config_of, host, killed, same

NOISES = ("gaussian", "low_rank")
DEALT = {  # every member sees one of four prompts, and every prompt four members
    "task": {"name": "conciseness", "train_size": 4},
    "es": {"population": 16, "sigma": 0.05, "prompts_per_member": 1},
    "optim": {"learning_rate": 0.02, "anchor": {}},
    "train": {"steps": 2, "checkpoint_every": 4},
    "evals": {"every": 0},
    "mesh": {"groups": 1},
}


def dealt(source, **groups):
    """The config of a run of such members on the model at `source`; `groups` has the fields that differ."""
    return config_of(source, **{name: DEALT.get(name, {}) | groups.get(name, {}) for name in {**DEALT, **groups}})


def test_short_names():
    config = freeze(lab.get_config("noise=low_rank,rank=4,population=256,prompts_per_member=2"))
    assert (config.es.noise, config.es.rank, config.es.population, config.es.prompts_per_member) == (
        "low_rank",
        4,
        256,
        2,
    )
    assert config.decode.members_at_once is None and freeze(lab.get_config("")).decode.members_at_once == 4
    with pytest.raises(
        ValueError, match=r"es\.prompts_per_member is 1 with es\.population = 8 .* set it to 16 or 24 or 32"
    ):
        freeze(lab.get_config("noise=low_rank,prompts_per_member=1"))
    with pytest.raises(ValueError, match=r"'prompts_per_member=1' is of the group es"):
        lab.get_config("grpo,prompts_per_member=1")


def lab_config(argument, **fields):
    config = lab.get_config(argument)
    config.update_from_flattened_dict({"mesh.groups": 1, **{name.replace("__", "."): x for name, x in fields.items()}})
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The laboratory's run of 128 members that see a prompt each: its config, directory and final weights."""
    config = lab_config("noise=low_rank,population=128,prompts_per_member=1,steps=4", train__checkpoint_every=2)
    config.evals.every, config.evals.rows, config.evals.tasks = 2, 8, ("lab-add",)
    config.train.profile = (3, 5)
    workdir = tmp_path_factory.mktemp("whole")
    return config, workdir, host(run(config, workdir).params)


def test_a_run_of_the_laboratory_is_traced_and_knows_its_curvature(whole):
    _, workdir, _ = whole
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["curvature_gap"] is not None] == [1, 3]
    assert all(abs(row["curvature_gap"]) < 0.2 for row in rows if row["curvature_gap"] is not None)
    assert all(0 <= row["tied_members"] <= 1 and row["expected_gain"] > 0 for row in rows)
    assert rows[-1]["drift"] == pytest.approx(rows[-1]["drift_theory"], rel=0.03)
    assert rows[-1]["kappa"] == pytest.approx(rows[-1]["drift"] / 90_432**0.5 / 0.01, rel=1e-6)
    profile = json.loads((workdir / "profile.json").read_text())
    assert min(profile[f"seconds_{part}"] for part in ("perturb", "prefill", "decode", "update", "estimate")) > 0
    assert read_config(workdir).decode.members_at_once == 128


def test_members_that_hardly_differ_have_no_curvature(tmp_path):
    """They give the answers of θ, which is decoded by itself, a prompt a lane: each row has to have its own reward."""
    fields = {"task__prompts_per_step": 8, "evals__tasks": (), "evals__every": 1, "evals__rows": 2}
    run(lab_config("noise=low_rank,population=8,prompts_per_member=2,sigma=1e-9,steps=1", **fields), tmp_path)
    (row,) = (row for row in read_jsonl(tmp_path / "metrics.jsonl") if "curvature_gap" in row)
    assert row["reward_std"] > 0 and row["curvature_gap"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("groups", "model"), [(1, 1), (4, 2)])
def test_killed_and_resumed_where_memory_and_mesh_differ(groups, model, whole, tmp_path, monkeypatch):
    config, workdir, final = whole
    with killed(SeedLog, "append", call=3):
        run(config, tmp_path)
    monkeypatch.setattr("es_jax.training.loop.members_at_once", lambda *a: 1)
    other = config.copy_and_resolve_references()
    other.mesh.groups, other.mesh.model, other.train.profile = groups, model, ()
    assert same(run(other, tmp_path).params, final)
    assert (tmp_path / "seedlog.jsonl").read_bytes() == (workdir / "seedlog.jsonl").read_bytes()
    assert read_config(tmp_path).decode.members_at_once == 128
    for name in ("lab-countdown", "lab-add"):
        ours, theirs = (read_jsonl(folder / f"evals/{name}.jsonl") for folder in (tmp_path, workdir))
        assert ours == theirs and [row["step"] for row in theirs] == [0, 2, 4]


def test_such_a_run_is_replayed_evaluated_exported_and_reported(whole, tmp_path):
    _, workdir, final = whole
    ((_, third), (_, last)) = ((step, host(params)) for step, params in replay(workdir, steps=[3, 4]))
    assert same(last, final) and not same(third, final)
    rows = evaluate_run(workdir, steps=[3, 4], drift=True, out=tmp_path / "out", options=Options(rows=8))
    (now,) = (row for row in rows["tasks"]["lab-countdown"] if row["step"] == 4)
    assert now["accuracy"] == read_jsonl(workdir / "evals/lab-countdown.jsonl")[-1]["accuracy"]
    drift = read_jsonl(tmp_path / "out/drift.jsonl")[-1]
    assert drift["kappa"] == pytest.approx(read_jsonl(workdir / "metrics.jsonl")[-1]["kappa"], rel=1e-5)
    export_run(workdir, tmp_path / "exported")
    assert same(load_model(tmp_path / "exported").params, final)
    result = write_report([workdir], tmp_path / "report")
    (row,) = result["results"]
    assert row["step"] == "4" and "drift" in result["figures"]


@pytest.mark.parametrize("noise", NOISES)
def test_where_all_prompts_are_seen_the_field_changes_no_bit(noise, tiny_model, tmp_path):
    ends = []
    for each in (4, None):
        es = {"noise": noise, "prompts_per_member": each}
        ends.append(host(run(dealt(tiny_model, es=es), tmp_path / str(each)).params))
    assert same(*ends)
    logs = [(tmp_path / str(each) / "seedlog.jsonl").read_bytes() for each in (4, None)]
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 2


@pytest.mark.parametrize(
    ("noise", "shaping", "antithetic"),
    [("gaussian", "z_score", False), ("low_rank", "centered_rank", False), ("low_rank", "z_score", True)],
)
def test_members_are_compared_on_the_prompts_that_they_saw(noise, shaping, antithetic, tiny_model, tmp_path):
    es = {"noise": noise, "shaping": shaping, "antithetic": antithetic}
    final = host(run(dealt(tiny_model, es=es), tmp_path).params)
    entries = read_entries(tmp_path)
    for entry in entries:
        seen = Population(16, seed=0, antithetic=antithetic).deal(entry.step, 4, 1)
        score = centred_on_prompts(np.array(entry.rewards)[:, None], seen)
        assert SHAPINGS[shaping](score).tolist() == entry.weights
    assert any(entry.weights != SHAPINGS[shaping](np.array(entry.rewards)).tolist() for entry in entries)
    ((_, rebuilt),) = replay(tmp_path, steps=[2])
    assert same(rebuilt, final)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["reward_mean"] for row in rows] == [pytest.approx(np.mean(entry.rewards)) for entry in entries]
    assert all(row["tokens"] <= 16 * 4 and row["mean_length"] == row["tokens"] / 16 for row in rows)


def test_random_rewards_do_not_know_who_saw_what(tiny_model, tmp_path):
    ends = []
    for each in (1, 2, None):
        es = {"rewards": "random", "prompts_per_member": each}
        ends.append(host(run(dealt(tiny_model, es=es), tmp_path / str(each)).params))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


class Counting(Conciseness):
    """The n-th score of a run is n; the third is no number."""

    calls = 0

    def score(self, example, completion):
        type(self).calls += 1
        return Score(np.nan if self.calls == 3 else float(self.calls), {"answer": 0.0})


@pytest.mark.parametrize("each", [1, 2])
def test_a_score_that_is_no_number_makes_its_member_the_worst(each, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_task", lambda config: Counting())
    es = {"prompts_per_member": each, "nan_rewards": "worst"}
    Counting.calls = 0
    run(dealt(tiny_model, es=es, train={"steps": 1}), tmp_path / "worst")
    (entry,), bad = read_entries(tmp_path / "worst"), 2 // each
    assert entry.rewards[bad] is None and entry.rewards.count(None) == 1
    assert entry.weights[bad] == min(entry.weights) < 0
    Counting.calls = 0
    with pytest.raises(ValueError, match=rf"row 'train-\d' \(reward nan\); .* for member {bad} \(nan\) of 16"):
        run(dealt(tiny_model, es=es | {"nan_rewards": "error"}), tmp_path / "error")


L2 = {"penalty": "l2", "strength": 5.0}
ELSEWHERE = "a model whose vectors are others"
OPTIMIZERS = {
    "l2": {"anchor": L2},
    "l1": {"anchor": {"penalty": "l1", "strength": 0.02}},
    "schedules": {"schedule": "cosine:0.5", "anchor": L2 | {"schedule": "linear:0.1"}},
    "adamw": {"name": "adamw", "weight_decay": 0.5},
    "adamw as it is": {"name": "adamw", "anchor": L2},
    "lion": {"name": "lion", "weight_decay": 0.5, "max_grad_norm": 1.0},
    "following": {"name": "adamw", "weight_decay": 0.5, "anchor": L2 | {"ema_decay": 0.5}},
    "momentum": {"name": "momentum", "anchor": L2 | {"ema_decay": 0.5}},
    "elsewhere": {"anchor": L2 | {"source": ELSEWHERE}},
    "elsewhere and following": {"anchor": L2 | {"source": ELSEWHERE, "ema_decay": 0.5}},
}


def walked(config):
    """All steps of a run with random rewards, without decoding: (weights before, state, predicted drift)."""
    mesh, population = make_mesh(1), Population(config.es.population, seed=config.train.seed)
    params = load_base(config, mesh).params
    start = host(jax.tree.map(jnp.copy, params))
    state = State(config, mesh, params)
    predicted = PredictedDrift(config, perturbed_count(config, start), offset=state.offset)
    for step in range(1, config.train.steps + 1):
        rewards = rng.random_rewards(config.train.seed, step, config.es.population)
        rates = config.rates(step)
        entry = Entry.of(step, population.members(step), rewards=rewards, weights=z_score(rewards), rates=rates)
        state.apply(entry)
        predicted.add(entry)
    return start, state, predicted.norm


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_keep_their_bits_under_every_optimizer(name, tiny_model, tmp_path):
    optim = {"learning_rate": 0.02} | OPTIMIZERS[name]
    if optim.get("anchor", {}).get("source"):
        model = load_model(tiny_model)
        other = jax.tree.map(lambda leaf: leaf + jnp.float32(0.25), model.params)
        save_model(tmp_path / "other", dataclasses.replace(model, params=other))
        optim = optim | {"anchor": optim["anchor"] | {"source": str(tmp_path / "other")}}
    config = dealt(tiny_model, es={"noise": "low_rank", "vectors": "frozen"}, optim=optim, train={"steps": 8})
    with jax.numpy_dtype_promotion("standard"):  # optax's adam needs it
        start, state, predicted = walked(config)
    moved = map_named(lambda name, before, after: before.tobytes() != after.tobytes(), start, host(state.params))
    assert {name for name, is_moved in named_leaves(moved) if is_moved} == {
        name for name, leaf in named_leaves(start) if make_noise(config).perturbs(name, leaf)
    }
    assert (predicted is None) == (optim.get("name", "sgd") != "sgd")
    assert predicted is None or float(state.drift) == pytest.approx(predicted, rel=0.04)


def test_a_run_with_frozen_leaves_and_decay_resumes_and_is_evaluated(tiny_model, tmp_path):
    es = {"noise": "low_rank", "vectors": "frozen", "rewards": "random", "schedule": "cosine:0.5"}
    optim = OPTIMIZERS["following"]
    config = dealt(tiny_model, es=es, optim=optim, train={"steps": 3, "checkpoint_every": 1})
    with jax.numpy_dtype_promotion("standard"):  # optax's adam needs it
        final = host(run(config, tmp_path / "whole").params)
        with killed(SeedLog, "append", call=2):
            run(config, tmp_path / "cut")
        assert same(run(config, tmp_path / "cut").params, final)
        ((_, rebuilt),) = replay(tmp_path / "cut", steps=[3])
        evaluate_run(tmp_path / "cut", steps=[3], drift=True, options=Options(rows=2))
    assert same(rebuilt, final)
    (drift,), row = read_jsonl(tmp_path / "cut/evals/drift.jsonl"), read_jsonl(tmp_path / "cut/metrics.jsonl")[-1]
    assert drift["dim"] == perturbed_count(config, final) < sum(leaf.size for leaf in jax.tree.leaves(final))
    assert drift["kappa"] == pytest.approx(row["kappa"], rel=1e-5)


WALKS = {  # of 300 steps in the laboratory, N = 8: how near the closed form is
    "anchor=none": 0.02,
    "anchor=l2": 0.02,
    "anchor=l1": 0.05,
    "anchor=l2,rank=4,frozen": 0.02,
}


def closed_form(config, *, frozen=False):
    dim = 90_432 - 320 * frozen
    walk = {"learning_rate": 0.005, "dim": dim, "steps": config.train.steps, "population": 8}
    if (penalty := config.optim.anchor.penalty) == "none":
        return theory.random_walk_norm(**walk)
    return theory.anchored_norm(**walk, strength=config.anchor_strength, penalty=penalty)


@pytest.mark.parametrize("argument", WALKS)
def test_drift_obeys_the_closed_form(argument):
    frozen = "frozen" in argument
    fields = lab_config(f"noise=low_rank,{argument}".removesuffix(",frozen"))
    fields.es.vectors = "frozen" if frozen else "gaussian"
    config = freeze(fields)
    start, state, predicted = walked(config)
    assert perturbed_count(config, start) == 90_432 - 320 * frozen
    expected, tolerance = closed_form(config, frozen=frozen), WALKS[argument]
    assert float(state.drift) == pytest.approx(expected, rel=tolerance)
    assert predicted == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_drift_obeys_the_closed_form_with_rewards_of_a_task(tmp_path):
    fields = {"task__prompts_per_step": 8, "evals__every": 0, "train__samples": 0}
    config = freeze(lab_config("noise=low_rank,prompts_per_member=2,steps=200", **fields))
    run(config, tmp_path)
    squares = np.array([np.square(entry.weights).sum() for entry in read_entries(tmp_path)])
    moving = squares > 0  # where all who saw a prompt did equally well, and that on all prompts, nothing moves
    np.testing.assert_allclose(squares[moving], 8, rtol=1e-5)
    expected = closed_form(config) * moving.mean() ** 0.5
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["drift"] == pytest.approx(expected, rel=0.02)
    assert moving.mean() > 0.8


@pytest.mark.slow
def test_smollm2_learns_with_members_that_see_a_prompt_each(smollm2, tmp_path):
    config = conciseness.get_config("smollm2,noise=low_rank,population=16,prompts_per_member=1,steps=4")
    config.model.source, config.decode.max_new_tokens, config.evals.every, config.mesh.groups = str(smollm2), 12, 0, 1
    run(config, tmp_path)
    assert all(len(set(entry.rewards)) > 1 and any(entry.weights) for entry in read_entries(tmp_path))
    for row in read_jsonl(tmp_path / "metrics.jsonl"):
        assert row["drift"] == pytest.approx(row["drift_theory"], rel=0.05) and row["drift"] > 0
