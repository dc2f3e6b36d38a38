"""`evaluate --samples`: what replays, what is not mixed, and what does not change the samples."""

import json

import numpy as np
import pytest

from configs.lab import get_config
from es_jax.core.mesh import make_mesh
from es_jax.evals import runner
from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.evaluate import report
from es_jax.rundir.metrics import read_jsonl
from es_jax.tasks.lab import Lab
from es_jax.training.loop import run

TASK = "lab-countdown"
SAMPLED = {"rows": 12, "samples": 4, "temperature": 1.5, "max_prompt_tokens": 16, "max_new_tokens": 6}


def ask(out, workdir="lab", mesh=None, steps=None, **fields):
    """Samples of the lab's model, or of a step of a run of it, on one device; the devices are many elsewhere."""
    mesh = mesh or make_mesh(1, 1)
    return evaluate_run(workdir, tasks=[TASK], steps=steps, out=out, options=Options(**SAMPLED | fields), mesh=mesh)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The folder with the model's samples, and what was returned."""
    out = tmp_path_factory.mktemp("evals")
    return out, ask(out)


def verdicts(out, setting="n4-t1.5"):
    return read_jsonl(out / "samples" / setting / "verdicts" / "lab-countdown.jsonl")


def test_rows_of_samples(sampled):
    out, result = sampled
    (row,), (verdict,) = result["samples"][TASK], verdicts(out)
    assert result["warnings"] == [] and len(row["pass_at_k"]) == len(row["pass_at_k_se"]) == 4
    assert all(np.diff(row["pass_at_k"]) >= 0) and 0 < row["pass_at_k"][0] < row["pass_at_k"][3]
    assert (row["samples"], row["temperature"], row["top_p"], row["seed"], row["n"]) == (4, 1.5, 1.0, 0, 12)
    assert row["rows"] == result["tasks"][TASK][0]["rows"] and row["max_new"] == 6
    answers = [answer for row in verdict["answers"] for answer in row]
    assert len(set(answers)) > 12 and np.shape(verdict["right"]) == (12, 4)
    assert row["voting"] == pytest.approx(np.mean([answer is not None for answer in answers]))
    assert row["pass_at_k"][0] == pytest.approx(np.mean(verdict["right"]))
    text = report(result)
    assert f"{TASK}, 4 samples a row, temperature 1.5, top_p 1" in text and "majority@4" in text


@pytest.mark.parametrize(("groups", "model", "slots"), [(1, 2, 5)])
def test_neither_mesh_nor_slots_change_them(sampled, tmp_path, groups, model, slots):
    ask(tmp_path, mesh=make_mesh(groups, model), slots=slots)
    assert verdicts(tmp_path) == verdicts(sampled[0])


def test_the_first_samples_do_not_depend_on_how_many_there_are(sampled, tmp_path):
    ask(tmp_path, samples=2)
    for few, many in zip(verdicts(tmp_path, "n2-t1.5"), verdicts(sampled[0]), strict=True):
        assert few["answers"] == [row[:2] for row in many["answers"]]


def test_settings_are_not_mixed_and_what_is_done_is_not_done_again(sampled, tmp_path, monkeypatch):
    """Also where the evaluation died before the row of the samples was written."""

    def dying(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner.SampledFile, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path)
    assert not verdicts(tmp_path)
    first = ask(tmp_path)
    assert verdicts(tmp_path) == verdicts(sampled[0])
    other = ask(tmp_path, sample_seed=1)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["n4-t1.5", "n4-t1.5-s1"]
    assert verdicts(tmp_path, "n4-t1.5-s1")[0]["answers"] != verdicts(tmp_path)[0]["answers"]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "sample_rows", None)
        patch.setattr(runner, "evaluate", None)
        assert ask(tmp_path) == first and ask(tmp_path, sample_seed=1) == other
    with pytest.raises(ValueError, match=r"from 12 rows .* has 8"):
        ask(tmp_path, rows=8)


def test_a_step_of_a_run_and_its_exported_model_have_the_same_samples(sampled, tmp_path):
    """And both are compared with the base model, which drew with the same keys."""
    config = get_config("steps=1")
    config.task.prompts_per_step, config.es.population, config.evals.every = 16, 4, 0
    run(config, tmp_path / "run")
    of_run = ask(tmp_path / "of_run", tmp_path / "run", steps=[1])["samples"][TASK]
    assert [row["step"] for row in of_run] == [0, 1] and of_run[0] == sampled[1]["samples"][TASK][0]
    before, now = verdicts(tmp_path / "of_run")
    assert before == verdicts(sampled[0])[0]
    same = np.mean([a == b for a, b in zip(before["answers"], now["answers"], strict=True)])
    assert same > 0.2, "weights that are near each other draw alike"
    change = np.mean(now["right"]) - np.mean(before["right"])
    assert of_run[1]["pass_at_k_change"][0] == pytest.approx(change) and len(of_run[1]["pass_at_k_change_se"]) == 4
    export_run(tmp_path / "run", tmp_path / "model", step=1)
    assert ask(tmp_path / "of_model", tmp_path / "model")["samples"][TASK][0]["pass_at_k"] == of_run[1]["pass_at_k"]


def test_a_task_that_tells_no_answer_has_no_vote(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "extract_answer", None)
    result = ask(tmp_path)
    assert result["samples"][TASK][0]["majority"] is None and "voting" not in result["samples"][TASK][0]
    (warning,) = result["warnings"]
    assert f"task {TASK!r} has no majority voting" in warning and "extract_answer(" in warning
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("told", [3, ["85"], ZeroDivisionError])
def test_what_extract_answer_may_not_do_is_named(tmp_path, monkeypatch, told):
    def extract(self, example, completion):
        if isinstance(told, type):
            raise told
        return told

    monkeypatch.setattr(Lab, "extract_answer", extract)
    with pytest.raises(ValueError, match=rf"extract_answer of task {TASK!r} failed on a completion of row 'K\d+:"):
        ask(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.7}, r"temperature is 0\.7 without samples: set samples"),
        ({"sample_seed": 3}, "sample_seed is 3 without samples"),
        ({"samples": 4, "temperature": -1.0}, "temperature is -1: it must be finite and above 0"),
        ({"samples": 0}, "samples is 0: it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Options(**fields)
