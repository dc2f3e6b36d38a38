"""The tables of the comparison: runs are set beside each other where they have spent the same."""

import pytest

from experiments.es_vs_grpo import at, crossing, figure, forgetting_at, priors_of, table


def lines_of(row, seed, target, prior, rollouts):
    names = ("target", "prior", "rollouts")
    rows = [dict(zip(names, values, strict=True)) for values in zip(target, prior, rollouts, strict=True)]
    labels = {"target_task": "lab-sort", "row": row, "seed": seed}
    return [labels | r | {"tokens": 5 * r["rollouts"], "seconds": r["rollouts"] / 10, "drift": 1.0} for r in rows]


FAST = lines_of("GRPO", 0, (0.0, 0.4, 0.8), (1.0, 0.9, 0.8), (0, 100, 200))
SLOW = lines_of("ES", 0, (0.0, 0.2), (1.0, 0.5), (0, 150))


def test_runs_are_compared_at_the_most_that_both_spent():
    text = table(FAST + SLOW, "lab-sort")
    assert "| rollouts | 150 | GRPO | 1 | 0.600 | 0.850 | 0.150 |" in text
    assert "| rollouts | 150 | ES | 1 | 0.200 | 0.500 | 0.500 |" in text
    assert "| generated tokens | 750 |" in text and "| seconds of steps | 15 |" in text
    both = table([*FAST, *lines_of("GRPO", 1, (0.0, 1.0), (1.0, 1.0), (0, 200))], "lab-sort")
    assert "| 0.900 ± 0.100 |" in both  # of .8 and 1


def test_columns_are_linear_between_evaluations():
    assert at(FAST, "rollouts", 50, "target") == pytest.approx(0.2)


def test_a_divergence_is_shown_only_where_it_was_measured_nearby():
    last = [*FAST[:-1], FAST[-1] | {"kl": 0.5}]
    first = [FAST[0] | {"kl": 0.0}, *FAST[1:-1], last[-1]]
    assert table(first, "lab-sort").count("| 0.500 |") == 3  # at the end, by each budget
    assert "0.375" not in table(first + SLOW, "lab-sort")  # of 150, where ES ends


def test_what_is_lost_at_a_level_of_the_target():
    assert crossing(FAST, 0.6) == pytest.approx({"prior": 0.85, "drift": 1.0, "rollouts": 150.0, "lost": 0.15})
    assert crossing(SLOW, 0.6) is None
    text = forgetting_at(FAST + SLOW, "lab-sort", 0.6)
    assert "| GRPO | 1 of 1 | 0.150 | 1.00 | 150 |" in text and "| ES | 0 of 1 |" in text


def test_the_target_is_no_prior_task():
    assert "lab-sort" not in priors_of("lab-sort") and "lab-countdown" in priors_of("lab-sort")


def test_the_figure(tmp_path):
    figure(FAST + SLOW, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
