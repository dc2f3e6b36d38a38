"""The laws of GRPO runs: the same loop, directory and records as ES, and after a kill the same bits."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import conciseness, countdown, lab
from es_jax.evals.export_step import export_run
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import SeedLog
from es_jax.training.config import freeze
from es_jax.training.loop import run
from es_jax.training.recorder import Recorder
from es_jax.training.weights_at import replay
from es_jax.weights.model import load_model
from tests.helpers import config_of, host, killed, same

STEPS = 4


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's adamw needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


GRPO = {
    "method": "grpo",
    "task": {"name": "conciseness", "train_size": 3},
    "grpo": {"rollouts": 4, "mini_batch": 2, "micro_batch": 1},
    "optim": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0},
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 4, "slots": 2},
    "train": {"steps": STEPS, "checkpoint_every": 2, "samples": 1, "keep_checkpoints": 3},
    "evals": {"every": 2, "rows": 2},
}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """An uninterrupted run, anchored: its config, directory and final weights."""
    workdir = tmp_path_factory.mktemp("grpo")
    config = config_of(tiny_model, GRPO, optim={"anchor": {"penalty": "l2", "strength": 100.0}})
    with jax.numpy_dtype_promotion("standard"):
        result = run(config, workdir)
    return config, workdir, host(result.params)


def test_a_run_records_what_there_is_to_know(whole, tiny_model):
    _, workdir, final = whole
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        for name in ("reward_mean", "reward_std", "kl", "clip_fraction", "dual_clip_fraction", "ratio", "entropy",
                     "mean_length", "gradient_norm", "loss", "drift", "tokens"):  # fmt: skip
            assert np.isfinite(row[name]), name
        assert row["drift_theory"] is None and row["drift"] > 0 and row["gradient_norm"] > 0
    assert rows[0]["kl"] < rows[-1]["kl"] and rows[0]["entropy"] > 0
    assert rows[0]["ratio"] == pytest.approx(1, abs=0.1)
    lines = [json.loads(line) for line in (workdir / "seedlog.jsonl").read_text().splitlines()]
    assert all(len(line["rewards"]) == 12 and not line["seeds"] for line in lines)
    assert rows[1]["reward_mean"] == pytest.approx(np.mean(lines[1]["rewards"]))
    assert [row["step"] for row in read_jsonl(workdir / "evals/conciseness.jsonl")] == [0, 2, 4]
    assert len({row["completion"] for row in read_jsonl(workdir / "samples.jsonl")}) > 1  # sampled, not greedy
    assert not same(final, load_model(tiny_model).params)


EXACT = ("step", "reward_mean", "reward_std", "loss", "kl", "entropy", "ratio", "gradient_norm", "drift", "tokens")


@pytest.mark.parametrize(
    ("owner", "name", "call"), [(SeedLog, "append", 2), (SeedLog, "append", 3), (Recorder, "step", 4)]
)
def test_killed_and_resumed_equals_uninterrupted(owner, name, call, whole, tmp_path):
    config, uninterrupted, final = whole
    with killed(owner, name, call=call):
        run(config, tmp_path)
    result = run(config, tmp_path)
    assert same(result.params, final)
    assert (tmp_path / "seedlog.jsonl").read_bytes() == (uninterrupted / "seedlog.jsonl").read_bytes()
    for file in ("metrics.jsonl", "samples.jsonl", "evals/conciseness.jsonl"):
        ours, theirs = (
            [
                {k: v for k, v in row.items() if k in EXACT or file != "metrics.jsonl"}
                for row in read_jsonl(folder / file)
            ]
            for folder in (tmp_path, uninterrupted)
        )
        assert ours == theirs


def test_steps_with_a_checkpoint_are_read_back_and_others_refused(whole, tmp_path):
    _, workdir, final = whole
    rebuilt = {step: host(params) for step, params in replay(workdir)}
    assert sorted(rebuilt) == [0, 2, 4] and same(rebuilt[4], final) and not same(rebuilt[2], final)
    with pytest.raises(ValueError, match=r"step 3 .* checkpoints of steps 2, 4"):
        list(replay(workdir, steps=[3]))
    done = export_run(workdir, tmp_path / "out", step=2)
    assert done["source"] == "checkpoint" and same(load_model(tmp_path / "out").params, rebuilt[2])
    with pytest.raises(ValueError, match=r"step 1 .* checkpoints of steps 2, 4"):
        export_run(workdir, tmp_path / "no", step=1)
    assert same(load_model(export_run(workdir, tmp_path / "base", step=0)["out"]).params, rebuilt[0])


def test_an_anchor_holds_grpo_back(whole, tiny_model, tmp_path):
    anchored = read_jsonl(whole[1] / "metrics.jsonl")[-1]["drift"]
    run(config_of(tiny_model, GRPO, evals={"every": 0}), tmp_path)
    assert anchored < 0.95 * read_jsonl(tmp_path / "metrics.jsonl")[-1]["drift"]


def test_an_anchor_in_host_memory_gives_the_same_run(whole, tiny_model, tmp_path):
    """To rounding, which Adam makes large in a step whose gradient is none but of the KL: the reference's
    log-probabilities are another program where its weights come from the host."""
    optim = {"anchor": {"penalty": "l2", "strength": 100.0, "memory": "pinned_host"}}
    run(config_of(tiny_model, GRPO, optim=optim, train={"steps": 2}, evals={"every": 0}), tmp_path)
    for ours, theirs in zip(
        *(read_jsonl(folder / "metrics.jsonl")[:2] for folder in (tmp_path, whole[1])), strict=True
    ):
        assert ours["drift"] == pytest.approx(theirs["drift"], rel=1e-2)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=3e-2)


def test_every_option_runs(tiny_model, tmp_path):
    grpo = {"rollouts": 2, "mini_batch": 3, "micro_batch": 2, "kl_coef": 0.0, "entropy": 0.01, "clip_high": 0.3,
            "aggregation": "seq-mean-token-sum-norm", "scale_by_std": False, "temperature": 0.8}  # fmt: skip
    run(config_of(tiny_model, GRPO, grpo=grpo, train={"steps": 1}, evals={"every": 0}), tmp_path)
    row = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert "kl" not in row and row["ratio"] == pytest.approx(1, abs=1e-3)  # one mini-batch: nothing has moved yet


def test_any_task_takes_grpo_and_its_defaults_are_the_published_ones():
    for file in (conciseness, countdown, lab):
        assert freeze(file.get_config("method=grpo")).method == freeze(file.get_config("grpo")).method == "grpo"
        assert freeze(file.get_config()).method == "es"
    c = freeze(countdown.get_config("grpo"))
    g, o = c.grpo, c.optim
    assert (g.rollouts, g.temperature, g.mini_batch, c.task.train_size) == (30, 1.0, 32, 200)
    assert (g.clip_low, g.clip_high, g.dual_clip, g.kl_coef, g.entropy) == (0.2, 0.2, 3.0, 1e-3, 0.0)
    assert (g.log_ratio_limit, g.kl_limit, g.std_eps, g.aggregation) == (20.0, 10.0, 1e-6, "token-mean")
    assert (o.name, o.learning_rate, o.b1, o.b2, o.weight_decay, o.max_grad_norm) == (
        "adamw",
        1e-6,
        0.9,
        0.999,
        0.01,
        1,
    )
    with pytest.raises(
        ValueError, match=r"'population=8' is of the group es\.population, which method 'grpo' does not read"
    ):
        countdown.get_config("grpo,population=8")
    with pytest.raises(ValueError, match=r"'n=8' is of the group grpo\.rollouts, which method 'es'"):
        countdown.get_config("n=8")
    with pytest.raises(ValueError, match=r"with no strength: set either optim\.anchor\.strength"):
        freeze(countdown.get_config("grpo,anchor=l2"))


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"model": {"param_dtype": "bfloat16"}}, "model.param_dtype is 'bfloat16' with method 'grpo'"),
        (
            {"optim": {"name": "sgd", "anchor": {"penalty": "l2", "kappa": 1.0}}},
            "optim.anchor.kappa is 1.0 with method",
        ),
        ({"optim": {"name": "sgd", "weight_decay": 0.1}}, "'sgd' has none: set optim.name to 'adamw' or 'lion'"),
        ({"optim": {"b1": 1.0}}, "optim.b1 is 1.0"),
        ({"optim": {"max_grad_norm": 0.0}}, "optim.max_grad_norm is 0.0"),
        ({"grpo": {"rollouts": 1}}, "grpo.rollouts is 1"),
    ],
)
def test_bad_fields_are_refused_by_name(groups, says, tiny_model):
    base = dataclasses.asdict(freeze({"method": "grpo", "optim": {"name": "adamw"}}))
    for group, values in groups.items():
        base[group] |= {k: base[group][k] | v if isinstance(v, dict) else v for k, v in values.items()}
    with pytest.raises(ValueError) as error:
        freeze(base)
    assert says in str(error.value)


def test_grpo_learns_the_laboratorys_target(tmp_path):
    config = lab.get_config("grpo,steps=20,lr=0.001")
    config.evals.tasks, config.evals.every = (), 20
    run(config, tmp_path)
    rows = read_jsonl(tmp_path / "evals/lab-countdown.jsonl")
    assert rows[-1]["accuracy"] >= rows[0]["accuracy"] + 0.2
