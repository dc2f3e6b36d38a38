"""The experiments: their lists are valid at both sizes, a case runs once and is reported, rounding is as it says."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from configs import lab
from es_jax.rundir.metrics import read_jsonl
from es_jax.training.config import freeze
from experiments import es_vs_grpo, families, forgetting, lab_study, precision, sequence, strength_sweep
from experiments.runs import SIZES, Case, evaluations, execute, main, mean_se, page, report, table


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("experiment", [forgetting, strength_sweep, families])
def test_every_case_is_valid_and_has_its_own_folder(experiment, size, tmp_path):
    made = list(experiment.cases(size, [0, 1]))
    assert len({case.folder(tmp_path) for case in made}) == len(made) > 4
    assert all(case.config.evals.tasks for case in made) or experiment is strength_sweep
    seeds = {case.config.train.seed for case in made}
    assert seeds == {0, 1} and "Command:" in experiment.__doc__ and "Cost:" in experiment.__doc__


def test_a_sequence_is_pulled_where_it_says():
    kept, again = (sequence.case("lab", 1, anchor, 0, start="there").config for anchor in ("base", "re-anchored"))
    assert (kept.model.source, kept.optim.anchor.source) == ("there", "lab")
    assert (again.model.source, again.optim.anchor.source) == ("there", None)
    assert sequence.case("full", 2, "none", 0, start="there").config.optim.anchor.penalty == "none"
    first = sequence.case("lab", 0, "base", 0, start="").config
    assert first.model.source == "lab" and first.optim.anchor.source is None


def test_a_case_runs_once_and_is_reported(tmp_path, monkeypatch, capsys):
    config = lab.get_config("steps=1")
    config.update_from_flattened_dict({"task.prompts_per_step": 4, "evals.rows": 8, "evals.tasks": ("lab-add",)})
    config.es.rewards = "random"  # so that the step moves the weights
    cases = [Case.of(config, target="lab-countdown", N=8, AWD="none", seed=0)]
    execute(cases, tmp_path, index=0)
    monkeypatch.setattr("experiments.runs.run", None)
    execute(cases, tmp_path)
    lines = evaluations(cases[0], cases[0].folder(tmp_path))
    assert [line["step"] for line in lines] == [0, 1] and lines[1]["kappa"] > 0 == lines[0]["drift"]
    assert lines[1]["prior_change"] == pytest.approx(-lines[1]["of_format"] - lines[1]["of_knowledge"])
    path = cases[0].folder(tmp_path) / "evals/lab-add.jsonl"
    rows = read_jsonl(path)  # one more, as `python -m es_jax.evaluate` adds it
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], {"step": 3, "n": 8, "accuracy": 0.5}, rows[1]]))
    assert evaluations(cases[0], cases[0].folder(tmp_path)) == lines
    report(lines, tmp_path / "docs", "x", labels=("target", "N", "AWD"), figure=None)
    assert "| lab-countdown | 8 | none | 1 | 1 |" in capsys.readouterr().out
    assert len((tmp_path / "docs/x.csv").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="index is 1"):
        execute(cases, tmp_path, index=1)
    with pytest.raises(ValueError, match="same labels"):
        execute(cases * 2, tmp_path)


def finished(case, out, *, accuracy):
    """What a finished run leaves behind, with made-up numbers."""
    folder = case.folder(out)
    (folder / "evals").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(case.config), "digest": "d"}))
    (folder / "metrics.jsonl").write_text('{"step": 80, "drift": 1.0, "drift_theory": 1.0, "kappa": null}\n')
    for name in (case.config.task.name, *case.config.evals.tasks):
        rows = [{"step": step, "n": 8, "accuracy": accuracy * step / 80} for step in (0, 80)]
        (folder / f"evals/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "DONE").touch()


def call(monkeypatch, main, *options):
    monkeypatch.setattr(sys, "argv", ["experiment", *map(str, options)])
    main()


def test_a_sequence_is_listed_and_what_is_finished_reported(tmp_path, monkeypatch, capsys):
    out = f"--out={tmp_path}"
    call(monkeypatch, sequence.main, out, "--list")
    assert len(capsys.readouterr().out.splitlines()) == 6 and not list(tmp_path.iterdir())
    call(monkeypatch, sequence.main, out, "--only-report")
    assert capsys.readouterr().out == "no case is finished: leave --only-report out\n"
    for stage in sequence.sequence("lab", "base", 1, tmp_path)[:2]:
        finished(stage, tmp_path, accuracy=0.5)
    call(monkeypatch, sequence.main, out, "--only-report")
    assert "| 1 | lab-add | base | 1 | 160 | 0.500 | 0.500 | 0.500 | 0.500 |" in capsys.readouterr().out
    assert (tmp_path / "sequence.png").exists()
    for index in (99, -1):
        with pytest.raises(SystemExit, match=f"index is {index}: it must be 0 to 5"):
            call(monkeypatch, sequence.main, out, f"--index={index}")
    with pytest.raises(ValueError, match="index is 99"):
        call(monkeypatch, sequence.main, out, "--index=99", "--traceback")


def test_a_case_of_a_job_array_is_run_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.sequence.execute", lambda cases, out: finished(cases[0], out, accuracy=0.5))
    monkeypatch.setattr("experiments.sequence.export_run", lambda folder, weights: weights.mkdir(parents=True))
    call(monkeypatch, sequence.main, f"--out={tmp_path}", "--index=4")
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        f"anchor-base_stage-{stage}_task-{task}_seed-1" for stage, task in enumerate(sequence.STAGES["lab"])
    ]
    assert "| 2 | lab-sort | base | 1 | 240 |" in capsys.readouterr().out


@pytest.mark.parametrize("experiment", [forgetting, strength_sweep, families])
def test_a_missing_model_is_named_before_anything_runs(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.runs.run", None)
    wanted = (
        r"^the model runs/lab-\w+.* does not exist: run python -m experiments\.pretrain_lab --\w+=\S+ --out=runs/lab-"
    )
    with pytest.raises(SystemExit, match=wanted):
        call(monkeypatch, lambda: main("", "x", experiment.cases, labels=("seed",)), f"--out={tmp_path}")
    with pytest.raises(SystemExit, match="index is 99"):
        call(monkeypatch, lambda: main("", "x", experiment.cases, labels=("seed",)), "--index=99")


@pytest.mark.parametrize(("study", "options"), [(es_vs_grpo, ["--sort=there"]), (lab_study, ["--models", "there"])])
def test_studies_name_a_missing_model(study, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="the model there does not exist: run python -m experiments"):
        call(monkeypatch, study.main, *options)
    call(monkeypatch, study.main, "--only-report")
    assert "no run is finished" in capsys.readouterr().out


def test_runs_of_independent_seeds_have_a_page_and_a_page_that_cannot_be_is_explained(tmp_path, monkeypatch, capsys):
    cases = [case for case in forgetting.cases("lab", [0, 1]) if case.labels["N"] == 8 and case.labels["AWD"] == "none"]
    for case in cases:
        finished(case, tmp_path, accuracy=0.5)
    run = lambda: main("", "x", lambda *_: cases, labels=("target",), figure=forgetting.figure)  # noqa: E731
    call(monkeypatch, run, f"--out={tmp_path}", "--only-report")
    assert (tmp_path / "report/report.html").exists() and (tmp_path / "x.png").exists()
    assert (tmp_path / "x.md").read_text().splitlines()[2].endswith("| – |")  # no κ is known
    results = (tmp_path / "report/tables/results.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[1:3] for line in results] == [["2", "80"]] * 2  # two targets over two seeds
    other = Case(cases[0].labels | {"seed": 2}, freeze({"decode": {"max_new_tokens": 9}}))
    finished(other, tmp_path, accuracy=0.5)
    page([case.folder(tmp_path) for case in (*cases, other)], tmp_path / "report")
    assert "no page of es_jax.report: these runs cannot be compared" in capsys.readouterr().out


def test_tables_average_over_seeds():
    lines = [{"N": n, "seed": seed, "step": 5, "prior": n / 10 + seed} for n in (1, 2) for seed in (0, 1)]
    assert table(lines, ("N",), ("prior",)).splitlines()[2:] == [
        "| 1 | 2 | 5 | 0.600 ± 0.500 |", "| 2 | 2 | 5 | 0.700 ± 0.500 |",
    ]  # fmt: skip
    assert mean_se([None]) == "–" and mean_se([0.5, None]) == "0.500"


def test_rounding_is_that_of_the_dtype():
    import ml_dtypes

    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e-4
    assert np.array_equal(precision.bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.array_equal(precision.float16(x), x.astype(np.float16).astype(np.float32))


def test_float32_walks_as_the_closed_form_says_and_a_member_leaves_the_weights_as_they_were(monkeypatch):
    monkeypatch.setattr(precision, "STEPS", 60)
    found = precision.random_walk(30, 3000, seed=0)
    for name, (n, penalty, strength, _) in precision.SETTINGS.items():
        if n == 30:
            assert found[name, "float32"] == pytest.approx(precision.exact(n, penalty, strength, steps=60), rel=0.04)
    assert found["N = 30, AWD l2 10", "bfloat16"] > 1.1 * found["N = 30, AWD l2 10", "float32"]
