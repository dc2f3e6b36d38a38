"""Weights, scores and likelihoods that are not finite end a run at their step, and the step is discarded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.evals.drift import drift
from es_jax.evals.export_step import export_run
from es_jax.evals.kl import kl
from es_jax.generate.score import score_options
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer
from es_jax.rundir.checkpoints import saved_steps
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import read_entries
from es_jax.scoring.heldout import likeliest
from es_jax.tasks.conciseness import Conciseness
from es_jax.tasks.task import Score
from es_jax.training import loop
from es_jax.training.loop import run
from es_jax.training.state import State
from es_jax.training.weights_at import replay, weights_at
from es_jax.weights.verify import VerificationReport
from tests.helpers import SMALL_RUN, config_of, same

GRPO = {
    "method": "grpo",
    "task": {"name": "conciseness", "train_size": 2, "prompts_per_step": 2},
    "optim": {"name": "adam", "learning_rate": 1e-3},
    "grpo": {"rollouts": 2, "mini_batch": 1, "micro_batch": 2},
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 4, "slots": 2},
    "train": {"steps": 4, "checkpoint_every": 2, "samples": 1},
    "evals": {"every": 0},
}
TINY = TransformerConfig(
    family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8
)  # fmt: skip


@pytest.fixture(autouse=True)
def promotion():
    """optax needs it for adam, and for weights in half precision."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    ("groups", "remedy"),
    [
        ({"optim": {"learning_rate": 1e38, "anchor": {}}}, "lower optim.learning_rate (1e+38), in another --workdir"),
        ({"optim": {"learning_rate": 3e37, "anchor": {}, "name": "adam"}}, "optim.learning_rate (3e+37)"),
        (
            {"optim": {"learning_rate": 1e7, "anchor": {}}, "model": {"param_dtype": "float16"}},
            "lower optim.learning_rate (1e+07), or set model.param_dtype ('float16') to 'float32', in another",
        ),
        (
            {"optim": {"learning_rate": 1e38, "anchor": {}}, "model": {"param_dtype": "bfloat16"}},
            "or set model.param_dtype ('bfloat16') to 'float32'",
        ),
        (
            {
                "optim": {"learning_rate": 1e7, "anchor": {}},
                "model": {"param_dtype": "float16"},
                "es": {"noise": "shared_seed"},
            },
            "model.param_dtype ('float16')",
        ),
    ],
)
def test_weights_end_a_run_at_their_step(groups, remedy, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"^step 1: its weights are NaN, infinite or too large.* in \w+/") as error:
        es = {"rewards": "random"} | groups.get("es", {})  # they are not all equal
        run(config_of(tiny_model, **groups | {"es": es, "train": {"checkpoint_every": 1}}), tmp_path)
    assert remedy in str(error.value) and "the step is discarded" in str(error.value)
    assert not read_entries(tmp_path) and not saved_steps(tmp_path) and not read_jsonl(tmp_path / "metrics.jsonl")
    assert not (tmp_path / "DONE").exists()


def break_at(step, number, monkeypatch):
    """From then on a step's first leaf has that number in one place."""
    apply = State.apply

    def broken(self, entry):
        apply(self, entry)
        if entry.step >= step:
            leaves, tree = jax.tree.flatten(self.params)
            leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(number)
            self.params, self.drift = jax.tree.unflatten(tree, leaves), jnp.float32(number) * jnp.float32(number)

    monkeypatch.setattr(State, "apply", broken)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3e19])
def test_the_steps_before_stay_and_the_run_goes_on_from_them(number, tiny_model, tmp_path, monkeypatch):
    config = config_of(tiny_model, train={"checkpoint_every": 2})
    whole = run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_at(4, number, patch)
        with pytest.raises(ValueError, match=r"^step 4: its weights .* in embed/embedding: the step is discarded"):
            run(config, tmp_path / "run")
        assert len(read_entries(tmp_path / "run")) == 3 and saved_steps(tmp_path / "run") == [2]
        assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
        with pytest.raises(ValueError, match=r"^step 4: its weights"):  # again: it is the same step
            run(config, tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out")["step"] == 3
    assert same(run(config, tmp_path / "run").params, whole.params)


def test_a_log_and_a_checkpoint_with_broken_weights_are_refused(tiny_model, tmp_path, monkeypatch):
    """What a run left that did not look at its weights."""
    monkeypatch.setattr(loop._Run, "_check_finite", lambda *_: None)
    large = {"optim": {"learning_rate": 1e38, "anchor": {}}, "es": {"rewards": "random"}}
    config = config_of(tiny_model, **large, train={"steps": 2}, evals={"every": 0})
    run(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [2]
    for weights in (
        replay(tmp_path / "run", steps=[2]),
        weights_at(tmp_path / "run", [2]),
        weights_at(tmp_path / "run", [1]),
    ):
        with pytest.raises(ValueError, match=r"step \d of .*: its weights are NaN, .*choose an earlier step"):
            next(weights)
    with pytest.raises(ValueError, match=r"step 2 of .*: its weights are NaN"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot continue from step 2: its weights are NaN"):
        run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)), tmp_path / "run")


@pytest.mark.parametrize("rate", [1e38, 1e30])
def test_weights_end_a_run_of_grpo(rate, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"^step \d: its weights are NaN, infinite or too large.* in \w+/") as error:
        run(config_of(tiny_model, GRPO, optim={"learning_rate": rate}, train={"steps": 9}), tmp_path)
    step = len(read_entries(tmp_path)) + 1  # the first whose rewards are not all equal
    assert str(error.value).startswith(f"step {step}:") and all(saved < step for saved in saved_steps(tmp_path))


class Strange(Conciseness):
    """The fifth score of a run has a number that is none."""

    calls, bad = 0, ""
    reward, part = 0.0, 0.0

    def score(self, example, completion):
        type(self).calls += 1
        odd = self.calls == 5
        type(self).bad = example.id if odd else self.bad
        return Score(self.reward if odd else float(self.calls), {"answer": self.part if odd else 0.0})


@pytest.mark.parametrize("fields", [SMALL_RUN, GRPO], ids=["es", "grpo"])
@pytest.mark.parametrize("numbers", [{"reward": np.nan}, {"reward": -np.inf}, {"part": np.inf}], ids=str)
def test_a_score_ends_a_run_and_its_row_is_named(fields, numbers, tiny_model, tmp_path, monkeypatch):
    task = type("Strange", (Strange,), numbers)()
    monkeypatch.setattr(loop, "make_task", lambda config: task)
    with pytest.raises(ValueError, match=r"correct the task's score") as error:
        run(config_of(tiny_model, fields | {"evals": {"every": 0}}), tmp_path)
    assert str(error.value).startswith(f"task 'conciseness' has scores that are not finite: row '{task.bad}' (")
    assert task.bad and len(read_entries(tmp_path)) == (fields is GRPO)


@pytest.mark.parametrize("numbers", [{"reward": np.nan}, {"part": np.nan}, {"part": -np.inf}], ids=str)
def test_a_score_ends_an_evaluation(numbers, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_task", lambda config: type("Strange", (Strange,), numbers)())
    config = config_of(tiny_model, evals={"every": 1, "rows": 6})
    with pytest.raises(ValueError, match=r"task 'conciseness' has scores that are not finite: row '.+' \("):
        run(config, tmp_path)
    assert not read_jsonl(tmp_path / "evals/conciseness.jsonl")


@pytest.fixture(scope="module")
def tiny():
    return jax.jit(Transformer(TINY).init)(jax.random.key(0))


def broken(params, number):
    """One number of the embedding of token 7."""
    table = params["embed"]["embedding"]
    return params | {"embed": {"embedding": table.at[7, 0].set(number)}}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_an_option_does_not_win_by_a_likelihood_that_is_no_number(number, tiny):
    rows = [([1, 2], [[3], [4, 5]], 0), ([1, 7], [[3], [4, 5]], 0), ([7], [[2], [3]], 1)]
    assert set(likeliest(TINY, tiny, rows, dtype=jnp.float32)) <= {0.0, 1.0}
    with pytest.raises(ValueError, match=r"not finite in \d of 3 rows: row [ac] has \["):
        likeliest(TINY, broken(tiny, number), rows, dtype=jnp.float32, names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"options are not finite in \d of 3 rows: row 0 has"):
        score_options(TINY, broken(tiny, number), [row[:2] for row in rows])


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_kl_and_drift_of_weights_that_are_not_finite(number, tiny):
    now = broken(tiny, number)
    with pytest.raises(ValueError, match=r"KL is not finite for \d of 2 prompts: prompt \d, counted"):
        kl(TINY, tiny, now, [[1, 2], [3]], [[4], [5, 6]])
    with pytest.raises(ValueError, match=r"drift is not finite: .* weights in embed/embedding; "):
        drift(tiny, now)


@pytest.mark.parametrize("kl", [(np.nan, 0.0), (0.0, np.nan, 0.0), (0.0, np.inf)])
def test_a_model_is_not_verified_by_a_kl_that_is_no_number(kl):
    report = VerificationReport(len(kl), True, 0.0, kl, 1e-6, (("logits", 0.0),))
    assert not report.passed and f"position {np.argmax(~np.isfinite(kl))} " in str(report)


@pytest.mark.parametrize("call", [1, 3])
def test_log_probabilities_end_a_step_of_grpo(call, tiny_model, tmp_path, monkeypatch):
    from es_jax.training.grpo import GRPO as Method

    scored, calls = Method._scored, []

    def with_one_wrong(self, *arguments):
        rows = scored(self, *arguments)
        calls.append(1)
        return rows._replace(old=np.where(rows.weight > 0, np.nan, rows.old)) if len(calls) == call else rows

    monkeypatch.setattr(Method, "_scored", with_one_wrong)
    with pytest.raises(ValueError, match=rf"^step {call}: log-probabilities of completions are not finite for rows \w"):
        run(config_of(tiny_model, GRPO), tmp_path)
    assert len(read_entries(tmp_path)) == call - 1
