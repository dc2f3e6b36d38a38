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
from es_jax.training.loop import run

ASK = {"tasks": ["lab-countdown"], "steps": [2]}
SAMPLED = {"rows": 12, "samples": 4, "temperature": 1.5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 2 steps that evaluated nothing."""
    workdir = tmp_path_factory.mktemp("run")
    config = get_config("steps=2")
    config.task.prompts_per_step, config.es.population, config.evals.every = 16, 4, 0
    run(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def sampled(whole, tmp_path_factory):
    """Its samples on the mesh of all devices: the folder, and what was returned."""
    out = tmp_path_factory.mktemp("evals")
    return out, evaluate_run(whole, out=out, options=Options(**SAMPLED), **ASK)


def verdicts(out, setting="n4-t1.5"):
    return read_jsonl(out / "samples" / setting / "verdicts" / "lab-countdown.jsonl")


def test_rows_of_samples(sampled):
    out, result = sampled
    base, now = result["samples"]["lab-countdown"]
    assert [row["step"] for row in (base, now)] == [0, 2] and result["warnings"] == []
    assert len(now["pass_at_k"]) == len(now["pass_at_k_change_se"]) == 4
    assert all(np.diff(now["pass_at_k"]) >= 0) and 0 < now["pass_at_k"][0] < now["pass_at_k"][3]
    assert (now["samples"], now["temperature"], now["top_p"], now["seed"], now["n"]) == (4, 1.5, 1.0, 0, 12)
    assert now["rows"] == result["tasks"]["lab-countdown"][0]["rows"] and now["max_new"] == 6
    before, after = verdicts(out)
    answers = [answer for row in after["answers"] for answer in row]
    assert len(set(answers)) > 12 and np.shape(after["right"]) == (12, 4)
    assert now["voting"] == pytest.approx(np.mean([answer is not None for answer in answers]))
    same = np.mean([a == b for a, b in zip(before["answers"], after["answers"], strict=True)])
    assert same > 0.5, "two steps that are near each other draw with the same keys"
    text = report(result)
    assert "lab-countdown, 4 samples a row, temperature 1.5, top_p 1" in text and "majority@4" in text


@pytest.mark.parametrize(("groups", "model", "slots"), [(1, 2, 5), (2, 1, 48), (1, 1, 1)])
def test_neither_mesh_nor_slots_change_them(whole, sampled, tmp_path, groups, model, slots):
    options = Options(**SAMPLED, slots=slots)
    evaluate_run(whole, out=tmp_path, options=options, mesh=make_mesh(groups, model), **ASK)
    assert verdicts(tmp_path) == verdicts(sampled[0])


def test_the_first_samples_do_not_depend_on_how_many_there_are(whole, sampled, tmp_path):
    for n in (2, 3):
        evaluate_run(whole, out=tmp_path, options=Options(**SAMPLED | {"samples": n}), **ASK)
        for few, many in zip(verdicts(tmp_path, f"n{n}-t1.5"), verdicts(sampled[0]), strict=True):
            assert few["answers"] == [row[:n] for row in many["answers"]]


def test_settings_are_not_mixed_and_what_is_done_is_not_done_again(whole, tmp_path, monkeypatch):
    """Neither the greedy rows nor other settings' samples; also where the evaluation died in between."""
    ask = lambda **fields: evaluate_run(whole, out=tmp_path, options=Options(**SAMPLED | fields), **ASK)  # noqa: E731
    original, calls = runner.SampledFile.add, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner.SampledFile, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert len(verdicts(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(runner.EvalsFile, "check", lambda *args, **kwargs: None)
        first = ask()
    folders = sorted(path.name for path in (tmp_path / "samples").iterdir())
    other = ask(sample_seed=1, top_p=0.5)
    assert folders == ["n4-t1.5"] and (tmp_path / "samples" / "n4-t1.5-p0.5-s1").is_dir()
    assert verdicts(tmp_path, "n4-t1.5-p0.5-s1")[0]["answers"] != verdicts(tmp_path)[0]["answers"]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "sample_rows", None)
        patch.setattr(runner, "evaluate", None)
        assert ask() == first and ask(sample_seed=1, top_p=0.5) == other
    with pytest.raises(ValueError, match=r"from 12 rows .* has 8"):
        ask(rows=8)


def test_a_model_is_sampled_like_a_step_of_a_run(whole, sampled, tmp_path):
    export_run(whole, tmp_path / "model", step=2)
    options = Options(**SAMPLED, max_prompt_tokens=16, max_new_tokens=6)
    ask = {"tasks": ASK["tasks"], "base": "lab", "out": tmp_path / "evals", "options": options}
    rows = evaluate_run(tmp_path / "model", **ask)["samples"]["lab-countdown"]
    assert [row | {"step": 2 * row["step"]} for row in rows] == sampled[1]["samples"]["lab-countdown"]
    alone = evaluate_run("lab", **ask | {"base": None, "out": tmp_path / "alone"})
    assert alone["samples"]["lab-countdown"] == rows[:1]


def test_a_task_that_tells_no_answer_has_no_vote(tiny_model, tmp_path):
    options = Options(rows=2, samples=2, max_prompt_tokens=160, max_new_tokens=4)
    result = evaluate_run(tiny_model, tasks=["conciseness"], out=tmp_path, options=options)
    assert result["samples"]["conciseness"][0]["majority"] is None
    (warning,) = result["warnings"]
    assert "task 'conciseness' does not tell which answer it reads" in warning and "extract_answer(" in warning
    assert "–" in report(result)
    json.dumps(result, allow_nan=False)


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
