"""A run that starts from a step of another one: as a branch, and as a warm start."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest

from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.rundir import directory
from es_jax.rundir.metrics import read_jsonl
from es_jax.training.loop import run
from es_jax.training.start import config_of
from es_jax.training.weights_at import replay, weights_at
from es_jax.weights.model import load_model
from tests.helpers import TWO_STEPS, host, same
from tests.helpers import config_of as config_on

FIELDS = TWO_STEPS | {
    "es": {"population": 4, "sigma": 0.05, "rewards": "random"},
    "optim": {"learning_rate": 0.02, "anchor": {"penalty": "l2", "strength": 5.0}},
    "evals": {"every": 1, "rows": 2},
}


def distance(a, b):
    leaves = [jax.tree.leaves(host(tree)) for tree in (a, b)]
    return float(np.sqrt(sum(np.sum(np.square(np.float64(x) - y)) for x, y in zip(*leaves, strict=True))))


@pytest.fixture(scope="module")
def first(tiny_model, tmp_path_factory):
    """A run of two steps, to branch from: its directory, and the weights of its steps."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    run(config_on(tiny_model, FIELDS), workdir)
    return workdir, {step: host(params) for step, params in replay(workdir)}


def fields(**groups):
    return {name: FIELDS.get(name, {}) | groups.get(name, {}) for name in {**FIELDS, **groups}}


@pytest.fixture(scope="module")
def branch(first, tmp_path_factory):
    """A branch of its step 1, with another α and another seed."""
    workdir = tmp_path_factory.mktemp("runs") / "branch"
    changes = {"optim": {"learning_rate": 0.01}, "train": {"seed": 7}}
    result = run(fields(**changes), workdir, branch_from=f"{first[0]}@1")
    return workdir, host(result.params)


def test_a_branch_begins_at_the_step_and_is_pulled_to_where_the_parent_was(first, branch, tiny_model):
    (parent, steps), (workdir, final) = first, branch
    facts = directory.read(workdir)
    rebuilt = {step: host(params) for step, params in replay(workdir)}
    assert sorted(rebuilt) == [0, 1, 2] and same(rebuilt[0], steps[1]) and same(rebuilt[2], final)
    assert facts["config"]["model"]["source"] == f"{parent}@1"
    assert facts["config"]["optim"]["anchor"]["source"] == str(tiny_model)
    known = {name: facts["parent"][name] for name in ("step", "path", "digest", "branch", "seeds")}
    digest = directory.read(parent)["digest"]
    assert known == {"step": 1, "path": str(parent), "digest": digest, "branch": True, "seeds": [0]}
    assert facts["digest"] != digest and len(facts["parent"]["seedlog"]) == 64
    row = read_jsonl(workdir / "metrics.jsonl")[-1]
    assert row["step"] == 2 and row["drift"] == pytest.approx(distance(final, steps[1]), rel=1e-4)
    assert facts["config"]["model"]["template_date"] == directory.read(parent)["config"]["model"]["template_date"]


def test_a_branch_goes_on_evaluates_and_is_exported_without_its_parent(first, branch, tmp_path):
    shutil.copytree(first[0], tmp_path / "first")
    whole = run(fields(train={"seed": 7, "steps": 3}), tmp_path / "whole", branch_from=f"{tmp_path / 'first'}@1")
    config = fields(train={"seed": 7, "steps": 2})
    run(config, tmp_path / "cut", branch_from=f"{tmp_path / 'first'}@1")
    shutil.rmtree(tmp_path / "first")
    shutil.move(tmp_path / "cut", tmp_path / "moved")
    config["train"]["steps"] = 3
    result = run(config, tmp_path / "moved", branch_from=f"{tmp_path / 'first'}@1")
    assert same(result.params, whole.params)
    assert run(config, tmp_path / "moved").step == 3  # what it is a branch of is written down
    own = config_of(tmp_path / "moved")  # what the command takes where the parent is gone
    assert run(own, tmp_path / "moved", branch_from=f"{tmp_path / 'first'}@1").step == 3
    rows = evaluate_run(tmp_path / "moved", steps=[0, 3], drift=True, options=Options(rows=2))
    assert [row["step"] for row in rows["tasks"]["conciseness"]] == [0, 3]
    assert rows["drift"][0]["norm"] == pytest.approx(distance(result.params, first[1][1]), rel=1e-4)
    export_run(f"{tmp_path / 'moved'}@3", tmp_path / "model")
    assert same(load_model(tmp_path / "model").params, result.params)
    assert "started from | step 1 of the run" in (tmp_path / "model/README.md").read_text()
    shutil.rmtree(tmp_path / "moved/start")
    with pytest.raises(FileNotFoundError, match=r"moved/start, where the run kept those weights, nor that run"):
        run(config, tmp_path / "moved", branch_from=f"{tmp_path / 'first'}@1")
    with pytest.raises(FileNotFoundError, match=r"first@1' and is not there any more; looked for .*moved/start"):
        list(replay(tmp_path / "moved"))


def test_a_warm_start_is_pulled_to_the_step(first, tmp_path):
    """Weights alone: θ₀ and the anchor are those of the step; a branch of it is anchored there, too."""
    parent, steps = first
    anchor = {"optim": {"anchor": {"penalty": "l2", "strength": 49.9}}}  # α λ near 1: the weights land on the anchor
    config = fields(model={"source": str(parent)}, train={"seed": 5}, **anchor)
    result = run(config, tmp_path / "warm")
    facts = directory.read(tmp_path / "warm")
    assert facts["parent"]["step"] == 2 and not facts["parent"]["branch"]
    assert facts["config"]["optim"]["anchor"]["source"] is None
    assert distance(result.params, steps[2]) < 0.01 < distance(steps[1], steps[2])
    again = run(fields(train={"seed": 6}, **anchor), tmp_path / "next", branch_from=f"{tmp_path / 'warm'}@2")
    shutil.rmtree(tmp_path / "warm")
    assert distance(again.params, steps[2]) < 0.01
    ((_, rebuilt),) = replay(tmp_path / "next", steps=[2])
    assert same(rebuilt, again.params)


@pytest.mark.parametrize(
    ("source", "source_of_model", "says"),
    [
        ("{parent}@3", "", r"first@3' is step 3, but \S+first holds steps 0 to 2"),
        ("{parent}/ckpt@1", "", r"first/ckpt is not a run's directory"),
        ("{model}", "", "give the directory of a run and a step, RUN@STEP"),
        ("{parent}@1", "lab", r"model\.source is 'lab', and branch_from .* of another model"),
        ("{workdir}", "", "is a step of .* itself: choose another --workdir"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(source, source_of_model, says, first, tiny_model, tmp_path):
    workdir = tmp_path / "new"
    if source == "{workdir}":
        shutil.copytree(first[0], workdir)
        (workdir / "seedlog.jsonl").unlink()  # so that no step of it is finished
    names = {"parent": first[0], "model": tiny_model, "workdir": workdir}
    with pytest.raises((ValueError, OSError), match=says):
        run(fields(model={"source": source_of_model}), workdir, branch_from=source.format(**names))
    assert not (workdir / "start").exists() and not (workdir / ".lock").exists()


def test_a_branch_goes_on_as_what_it_is(first, branch, tiny_model):
    """Not as a branch of another step, nor as another model's run; what it is may be said in another way."""
    (parent, _), (workdir, final) = first, branch
    config = fields(optim={"learning_rate": 0.01}, train={"seed": 7})
    before = (workdir / "config.json").read_bytes()
    for step in ("@2", ""):
        with pytest.raises(ValueError, match=r"holds a run that began from '\S+first@1', and not from '\S+first(@2)?'"):
            run(config, workdir, branch_from=f"{parent}{step}")
    with pytest.raises(ValueError, match=r"model\.source is 'lab', and branch_from"):
        run(config | {"model": {"source": "lab"}}, workdir)
    assert (workdir / "config.json").read_bytes() == before
    for again in ({"branch_from": f"{parent}/@1"}, {}):
        config["model"] = {"source": str(tiny_model)}
        assert same(run(config, workdir, **again).params, final)


def test_the_fields_of_a_run_are_the_start_of_a_branch(first, tmp_path, caplog):
    config = config_of(first[0])
    config.es.population = 2
    with caplog.at_level(logging.WARNING):
        run(config, tmp_path / "new", branch_from=f"{first[0]}@2")
    assert "train.seed is 0, as of" in caplog.text
    kept = directory.read(tmp_path / "new")["config"]
    assert kept["es"]["population"] == 2 and kept["optim"]["learning_rate"] == 0.02
    assert len(json.loads((tmp_path / "new/seedlog.jsonl").read_text().splitlines()[0])["seeds"]) == 2


def test_steps_of_runs_are_compared_as_models(first, branch, tmp_path):
    """A step beside another one; a step alone is that of its run."""
    ask = dict(tasks=["conciseness"], options=Options(rows=2, max_new_tokens=2))
    result = evaluate_run(f"{first[0]}@2", base=f"{first[0]}@1", out=tmp_path / "out", drift=True, **ask)
    assert result["drift"][0]["norm"] == pytest.approx(distance(first[1][2], first[1][1]), rel=1e-4)
    alone = evaluate_run(f"{first[0]}@1", out=tmp_path / "alone", **ask)
    assert [row["step"] for row in alone["tasks"]["conciseness"]] == [0, 1]


def test_grpo_runs_branch_from_their_checkpoints(tiny_model, tmp_path):
    grpo = {"rollouts": 2, "mini_batch": 2}
    groups = dict(grpo=grpo, optim={"learning_rate": 1e-2}, evals={"every": 0})
    train = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 2}
    run(config_on(tiny_model, TWO_STEPS | {"method": "grpo"}, train=train, **groups), tmp_path / "first")
    with pytest.raises(ValueError, match=r"step 1 of .* there are checkpoints of steps 2, 3 alone"):
        run(fields(train={"steps": 1, "seed": 3}), tmp_path / "new", branch_from=f"{tmp_path / 'first'}@1")
    assert not (tmp_path / "new").exists()
    result = run(fields(train={"steps": 1, "seed": 3}), tmp_path / "new", branch_from=f"{tmp_path / 'first'}@2")
    ((_, start),) = weights_at(tmp_path / "new", [0])
    start = host(start)
    ((_, parent),) = weights_at(tmp_path / "first", [2])
    assert same(start, parent) and not same(result.params, parent)
