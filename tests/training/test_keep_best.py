"""train.keep_best: which step is the best, that its checkpoint stays, and that a kill at any point loses none."""

import json

import pytest

from es_jax.evals.export_step import export_run
from es_jax.rundir.best import step_of
from es_jax.rundir.checkpoints import Checkpoints, saved_steps
from es_jax.scoring.row_results import EvalsFile, read_evals
from es_jax.training import best_step
from es_jax.training.config import freeze
from es_jax.training.loop import run
from tests.helpers import TWO_STEPS, config_of, killed

REWARDS = {0: -9.0, 1: -5.0, 2: -7.0, 3: -5.0, 4: -8.0, 5: -8.0}  # the earlier of equal ones is the best: 1


def config(source, **train):
    """A run of 5 steps that is evaluated at each and keeps one checkpoint, and the best by its reward."""
    train = {"steps": 5, "checkpoint_every": 2, "keep_checkpoints": 1, "keep_best": "reward"} | train
    return config_of(source, TWO_STEPS, train=train, evals={"every": 1, "rows": 1})


@pytest.fixture
def rewards(monkeypatch):
    """Held-out rewards by step, in place of those that the model gets."""
    values, original = dict(REWARDS), EvalsFile.summary

    def told(step, now, base):
        return original(step, now, base) | {"reward": values[step]}

    monkeypatch.setattr(EvalsFile, "summary", staticmethod(told))
    return values


def best(workdir):
    return json.loads((workdir / "best.json").read_bytes())


def test_the_best_step_keeps_its_checkpoint(tiny_model, tmp_path, rewards):
    run(config(tiny_model), tmp_path)
    assert best(tmp_path) == {"step": 1, "task": "conciseness", "metric": "reward", "value": -5.0}
    assert saved_steps(tmp_path) == [1, 5] and step_of(tmp_path, "best") == 1
    result = export_run(tmp_path, tmp_path / "out", step="best")
    assert (result["step"], result["source"]) == (1, "checkpoint")
    rewards[6] = -1.0
    run(config(tiny_model, steps=6), tmp_path)
    assert best(tmp_path)["step"] == 6 and saved_steps(tmp_path) == [1, 6]  # the one before it goes with the next
    run(config(tiny_model, steps=6, keep_best=None), tmp_path)
    assert not (tmp_path / "best.json").exists()


POINTS = {
    "before the checkpoint": (Checkpoints, "save", "before"),
    "after the checkpoint": (Checkpoints, "save", "after"),
    "before the record": (best_step, "write_best", "before"),
    "after the record": (best_step, "write_best", "after"),
    "before the rows": (EvalsFile, "add", "before"),
    "after the rows": (EvalsFile, "add", "after"),
}


@pytest.mark.parametrize("call", [2, 3])
@pytest.mark.parametrize("point", sorted(POINTS))
def test_killed_at_any_point_the_best_step_is_there(tiny_model, tmp_path, rewards, point, call):
    owner, name, when = POINTS[point]
    with killed(owner, name, call=call, when=when):
        run(config(tiny_model), tmp_path)
    if (tmp_path / "best.json").exists() and best(tmp_path)["step"]:
        assert best(tmp_path)["step"] in saved_steps(tmp_path)
    run(config(tiny_model), tmp_path)
    assert best(tmp_path)["step"] == 1 and saved_steps(tmp_path) == [1, 5]


def test_a_run_that_only_gets_worse_is_best_at_its_base(tiny_model, tmp_path, rewards):
    rewards[0] = 0.0
    run(config(tiny_model, steps=2), tmp_path)
    assert best(tmp_path)["step"] == 0 and saved_steps(tmp_path) == [2]


def test_a_metric_that_is_turned_on_later_finds_the_best_of_all_steps(tiny_model, tmp_path, rewards):
    run(config(tiny_model, keep_best=None, steps=4), tmp_path)
    with pytest.raises(ValueError, match=r"--steps is 'best', but .* has no best.json, .* train.keep_best=METRIC"):
        step_of(tmp_path, "best", flag="--steps")
    run(config(tiny_model, keep_best="accuracy"), tmp_path)
    rows = read_evals(tmp_path / "evals" / "conciseness.jsonl")
    most = max(row["accuracy"] for row in rows)
    assert best(tmp_path)["step"] == min(row["step"] for row in rows if row["accuracy"] == most)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"keep_best": "acuracy"},
            r"unknown train.keep_best 'acuracy': did you mean 'accuracy'.*gsm8k:accuracy.*reward",
        ),
        ({"keep_best": "piqa:reward"}, r"unknown train.keep_best 'piqa:reward'"),
        ({"keep_best": "mean_length"}, r"unknown train.keep_best 'mean_length'"),
        (
            {"keep_best": "gsm8k:reward", "every": 0},
            r"keep_best is 'gsm8k:reward' with evals.every 0: .*set evals.every",
        ),
    ],
)
def test_metrics_that_are_not_there_are_refused_at_the_start(fields, message):
    every = fields.pop("every", 5)
    with pytest.raises(ValueError, match=message):
        freeze({"task": {"name": "countdown"}, "train": fields, "evals": {"every": every, "tasks": ["gsm8k"]}})


def test_a_task_without_options_has_no_likelihood_of_them(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"keep_best is 'loglik', but the task 'conciseness' has no options"):
        run(config(tiny_model, keep_best="loglik"), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_metrics_of_other_tasks_are_named_with_the_task():
    text = "tasks/mine.py:Mine:strict"
    fields = {"train": {"keep_best": text}, "evals": {"tasks": ["tasks/mine.py:Mine"]}}
    assert freeze(fields).best_metric == ("mine.Mine", "strict")
    assert freeze({"train": {"keep_best": "robust"}}).best_metric == ("countdown", "robust")


@pytest.mark.parametrize(("step", "number"), [("12", 12), (3, 3), ("0", 0)])
def test_steps_are_numbers_or_best(tmp_path, step, number):
    assert step_of(tmp_path, step) == number
    with pytest.raises(ValueError, match="step is 'last': give a whole number, or 'best'"):
        step_of(tmp_path, "last")
