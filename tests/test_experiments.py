"""The experiments: their lists are valid at both sizes, a case runs once and is reported, rounding is as it says."""

import numpy as np
import pytest

from configs import lab
from experiments import families, forgetting, precision, sequence, strength_sweep
from experiments.runs import SIZES, Case, evaluations, execute, mean_se, report, table


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
    config.update_from_flattened_dict({"task.prompts_per_step": 4, "evals.size": 8, "evals.tasks": ("lab-add",)})
    cases = [Case.of(config, target="lab-countdown", N=8, AWD="none", seed=0)]
    execute(cases, tmp_path, index=0)
    monkeypatch.setattr("experiments.runs.run", None)
    execute(cases, tmp_path)
    lines = evaluations(cases[0], cases[0].folder(tmp_path))
    assert [line["step"] for line in lines] == [0, 1] and lines[1]["kappa"] > 0 == lines[0]["drift"]
    assert lines[1]["prior_change"] == pytest.approx(-lines[1]["of_format"] - lines[1]["of_knowledge"])
    report(lines, tmp_path / "docs", "x", labels=("target", "N", "AWD"), figure=None)
    assert "| lab-countdown | 8 | none | 1 | 1 |" in capsys.readouterr().out
    assert len((tmp_path / "docs/x.csv").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="index is 1"):
        execute(cases, tmp_path, index=1)
    with pytest.raises(ValueError, match="same labels"):
        execute(cases * 2, tmp_path)


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
    found = precision.walk(30, 3000, seed=0)
    for name, (n, penalty, strength, _) in precision.SETTINGS.items():
        if n == 30:
            assert found[name, "float32"] == pytest.approx(precision.exact(n, penalty, strength, steps=60), rel=0.04)
    assert found["N = 30, AWD l2 10", "bfloat16"] > 1.1 * found["N = 30, AWD l2 10", "float32"]
