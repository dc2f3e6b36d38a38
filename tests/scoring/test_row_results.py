"""A row of evals/<task>.jsonl: standard errors, and a drop in accuracy as the sum of its reasons."""

import contextlib
import dataclasses
import json
import math
import os

import numpy as np
import pytest

from es_jax.scoring.row_results import (
    GRADERS,
    REASONS,
    RowResults,
    accuracy,
    seen_alone,
    set_aside,
    split_drop,
    summary,
)


def verdicts(text):
    """A row a letter: R right, r right to the paper's grader only, b wrong to it only, K wrong, F malformed, T cut."""
    letters = np.array(list(text))
    of = lambda which: np.isin(letters, list(which)).astype(float)  # noqa: E731
    return RowResults(
        right=of("Rr"),
        strict=of("Rb"),
        robust=of("Rb"),
        loglik=None,
        well_formed=of("RKb"),
        truncated=of("T"),
        length=np.ones(len(letters)),
        reward=of("Rr"),
    )


# By hand, of ten rows:  base  R R R R R R K F T K
#                        now   R K F F T R R R R K   lost: K, F, F, T;  gained: K, F, T
HAND = ("RRRRRRKFTK", "RKFFTRRRRK", {"knowledge": 0.0, "format": 0.1, "truncation": 0.0})


@pytest.mark.parametrize(
    ("base", "now", "expected"),
    [
        HAND,
        ("RRRR", "RKFT", {"knowledge": 0.25, "format": 0.25, "truncation": 0.25}),
        ("KFTR", "RRRR", {"knowledge": -0.25, "format": -0.25, "truncation": -0.25}),
        ("RRRR", "rrrr", {"knowledge": 0.0, "format": 0.0, "truncation": 0.0}),  # right all the same, by a fall-back
        ("KKFT", "FTKK", {"knowledge": 0.0, "format": 0.0, "truncation": 0.0}),  # wrong before and after
    ],
)
def test_a_drop_is_split_by_why_the_wrong_one_is_wrong(base, now, expected):
    assert split_drop(verdicts(base), verdicts(now)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("base", "now", "alone"),
    [
        ("RRRR", "RKKK", {"right": 0.0, "strict": 0.0, "robust": 0.0}),  # all see it
        ("RRRR", "RbbK", {"right": 0.5, "strict": 0.0, "robust": 0.0}),  # what only the published rule misreads
        ("bbRK", "RRbK", {"right": -0.25, "strict": 0.0, "robust": 0.0}),
        ("KKKK", "rrRK", {"right": -0.5, "strict": 0.0, "robust": 0.0}),  # won by fall-backs alone
        ("brbr", "rbrb", {"right": 0.0, "strict": 0.0, "robust": 0.0}),  # one loses where the others gain, as often
        ("bbbb", "rrrK", {"right": -0.75, "strict": 0.0, "robust": 0.0}),
    ],
)
def test_what_only_one_grader_sees_of_a_drop(base, now, alone):
    base, now = verdicts(base), verdicts(now)
    assert {view: seen_alone(base, now, view) for view in GRADERS} == alone
    row = summary(5, now, base)
    assert [row[f"{prefix}alone"] for prefix in GRADERS.values()] == [*alone.values()]


def test_strict_and_robust_can_be_alone_too():
    base, now = verdicts("RRRR"), verdicts("RRRR")
    now = dataclasses.replace(now, strict=np.array([1.0, 0, 0, 1]), robust=np.array([1.0, 0, 1, 0]))
    assert [seen_alone(base, now, view) for view in GRADERS] == [0.0, 0.25, 0.25]


def test_an_answer_that_another_grader_finds_is_not_lost_knowledge():
    assert split_drop(verdicts("RRRR"), verdicts("RbbK")) == {"format": 0.5, "truncation": 0.0, "knowledge": 0.25}


def test_results_without_a_robust_verdict_are_of_one_grader():
    before = verdicts("RKFT")
    fields = before.to_json()
    del fields["robust"]
    assert np.array_equal(RowResults.from_json(fields).robust, before.right)


def test_under_the_strict_grader_a_fall_back_is_format_drift():
    assert split_drop(verdicts("RRRR"), verdicts("RrrK"), "strict") == {
        "format": 0.5, "truncation": 0.0, "knowledge": 0.25,
    }  # fmt: skip


def test_the_parts_add_up_to_the_drop_whatever_the_rows():
    draw = np.random.default_rng(0)
    for _ in range(50):
        base, now = (verdicts("".join(draw.choice(list("RrbKFT"), 23))) for _ in range(2))
        row = summary(5, now, base)
        assert sum(row[f"lost_{reason}"] for reason in REASONS) == pytest.approx(-row["accuracy_change"])
        assert sum(row[f"strict_lost_{reason}"] for reason in REASONS) == pytest.approx(-row["strict_change"])
        assert sum(row[f"robust_lost_{reason}"] for reason in REASONS) == pytest.approx(-row["robust_change"])


def test_standard_errors_are_binomial_and_paired():
    base, now = np.repeat([1.0, 0.0], [60, 40]), np.repeat([1.0, 0.0, 1.0, 0.0], [50, 10, 5, 35])
    row = accuracy("accuracy", now, base)
    assert row["accuracy"] == 0.55 and row["accuracy_se"] == pytest.approx(math.sqrt(0.55 * 0.45 / 100))
    assert row["accuracy_change"] == pytest.approx(-0.05)
    # 15 rows changed: the variance of the difference is 15/100 − 0.05², far below that of two independent samples
    assert row["accuracy_change_se"] == pytest.approx(math.sqrt((0.15 - 0.0025) / 99))


def test_the_change_of_a_reward_is_paired():
    base = dataclasses.replace(verdicts("RRKK"), reward=np.array([1.0, 2.0, 3.0, 4.0]))
    row = summary(5, dataclasses.replace(base, reward=np.array([2.0, 3.0, 4.0, 6.0])), base)
    assert row["reward_change"] == 1.25 and row["reward_change_se"] == pytest.approx(0.25)
    assert row["reward_se"] > 0.6
    assert "reward_change" not in summary(5, base, None)


def test_without_a_base_nothing_is_compared_and_without_a_format_nothing_drifts():
    row = summary(3, verdicts("RKFT"), None)
    assert "accuracy_change" not in row and not any(name.startswith("lost") for name in row)
    formless = lambda text: dataclasses.replace(verdicts(text), well_formed=None)  # noqa: E731
    assert split_drop(formless("RRRR"), formless("RKFT")) == {"format": 0.0, "truncation": 0.25, "knowledge": 0.5}
    assert "well_formed" not in summary(3, formless("RK"), formless("RR"))


def test_verdicts_survive_their_file():
    before = dataclasses.replace(verdicts("RrKFT"), loglik=np.ones(5), parts={"format": np.arange(5.0)})
    after = RowResults.from_json(before.to_json())
    assert all(np.array_equal(getattr(before, name), getattr(after, name)) for name in vars(before) if name != "parts")
    assert np.array_equal(after.parts["format"], np.arange(5.0))
    assert summary(1, after, before) == summary(1, before, before)


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_rows_that_were_set_aside_come_back(tmp_path, monkeypatch, moves):
    """Also where no others took their place, and where a start was killed after so many moves."""

    def write(name, digest):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"step": 0, "rows": digest}) + "\n")

    def files():
        return {
            str(path.relative_to(tmp_path)): json.loads(path.read_text())["rows"] for path in tmp_path.rglob("*.jsonl")
        }

    def dying(*names, replace=os.replace, left=[moves]):  # noqa: B006
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*names)

    names = ("toy.jsonl", "verdicts/toy.jsonl")
    for name in names:
        write(name, "a")
    assert set_aside(tmp_path, "toy", "a") is None
    assert "other held-out rows from here on" in set_aside(tmp_path, "toy", "b")
    assert files() == {f"earlier/a/{name}": "a" for name in names} and set_aside(tmp_path, "toy", "b") is None
    assert "is back" in set_aside(tmp_path, "toy", "a") and files() == dict.fromkeys(names, "a")
    set_aside(tmp_path, "toy", "b")
    for name in names:
        write(name, "b")
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", dying)
        set_aside(tmp_path, "toy", "a")
    set_aside(tmp_path, "toy", "a")
    assert files() == dict.fromkeys(names, "a") | {f"earlier/b/{name}": "b" for name in names}
