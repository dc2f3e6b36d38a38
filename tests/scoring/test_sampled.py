"""pass@k and the majority's vote by hand and by brute force, and which answers the tasks tell."""

import itertools

import numpy as np
import pytest

from es_jax.scoring.sampled import SampledResults, Sampling, majority, pass_at_k, summary
from es_jax.tasks import get_task
from es_jax.tasks.columns import Columns
from es_jax.tasks.task import Example, VotingTask


def results(right, answers=None):
    right = np.array(right, float)
    return SampledResults(right, right, 0 * right, 0 * right, 3 + 0 * right, 2 * right, answers)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    rows = np.array(list(itertools.product([False, True], repeat=n)))
    for row, rates in zip(rows, pass_at_k(rows), strict=True):
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in itertools.combinations(row, k)]
            assert rates[k - 1] == pytest.approx(np.mean(subsets))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n = 4 samples that pass with p, its mean is 1 − (1 − p)^k."""
    rows, p = np.array(list(itertools.product([False, True], repeat=4))), 0.3
    weights = np.prod(np.where(rows, p, 1 - p), axis=1)
    assert weights @ pass_at_k(rows) == pytest.approx([1 - (1 - p) ** k for k in range(1, 5)])


@pytest.mark.parametrize(
    ("right", "answers", "says"),
    [
        ([1, 0, 0, 1], ["7", "8", "8", "7"], 0.5),  # a tie of a right and a wrong answer
        ([0, 0, 0, 1, 0, 1], ["1", "2", "3", "7", None, "7"], 1.0),
        ([1, 0, 0], ["7", "8", "9"], 1 / 3),
        ([1, 0, 0], ["7", None, None], 1.0),  # who finds no answer does not vote
        ([0, 0], [None, None], 0.0),
        ([0.5, 0, 1], ["a", "b", "a"], 0.75),  # marks of one answer that differ
    ],
)
def test_the_vote_by_hand(right, answers, says):
    assert majority(right, answers) == pytest.approx(says)


def test_a_row_of_the_file_by_hand():
    base = results([[0, 0], [1, 0]], [["1", "2"], ["3", "4"]])
    now = results([[1, 0], [1, 1]], [["5", "2"], ["3", "3"]])
    row = summary(4, now, base)
    assert (row["step"], row["n"]) == (4, 2)
    assert row["pass_at_k"] == [0.75, 1.0] and row["pass_at_k_change"] == [0.5, 0.5]
    assert row["pass_at_k_se"] == pytest.approx([0.25, 0.0])  # of the rows' 0.5 and 1: std √(1/8), over √2
    assert row["pass_at_k_change_se"] == pytest.approx([0.0, 0.5])
    assert row["strict_pass_at_k"] == [0.75, 1.0] and row["robust_pass_at_k"] == [0.0, 0.0]
    assert row["majority"] == 0.75 and row["majority_change"] == 0.5 and row["voting"] == 1.0
    assert row["reward"] == 1.5 and row["reward_change"] == 1.0 and row["mean_length"] == 3.0
    alone = summary(0, now, None)
    assert "pass_at_k_change" not in alone and "majority_change" not in alone
    silent = summary(0, results([[1, 0]]), None)
    assert silent["majority"] is None and "voting" not in silent and silent["pass_at_k_se"] == [None, None]


def test_results_survive_json():
    now = results([[1, 0], [1, 1]], [["5", None], ["3", "3"]])
    again = SampledResults.from_json(now.to_json())
    assert again.answers == now.answers and (again.right == now.right).all()


ANSWERS = [
    ("gsm8k", "72", "so 48 + 24 = 72\n#### 72.0", "72"),
    ("gsm8k", "72", "#### 1/3", "1"),  # the published grader reads a run of 0-9 . , - alone
    ("gsm8k", "72", "I do not know", None),
    ("proofwriter", "True", "Answer: true", "True"),
    ("proofwriter", "True", "It is true.\nDone.", None),
    ("arc-challenge", "B", "The answer is (c).", "C"),
    ("arc-challenge", "B", "none of them", None),
    ("lab-add", "85", "85", "85"),
    ("lab-add", "85", "8x", None),
]


@pytest.mark.parametrize(("name", "answer", "completion", "told"), ANSWERS)
def test_tasks_tell_the_answer_that_their_published_grader_reads(name, answer, completion, told):
    task = get_task(name)
    assert isinstance(task, VotingTask)
    assert task.extract_answer(Example("0", "?", answer), completion) == told


def test_expressions_that_the_grader_cannot_tell_apart_are_one_answer():
    task, example = get_task("countdown"), Example("0", "", None, {"numbers": (44, 19, 35), "target": "98"})
    told = [
        task.extract_answer(example, f"<answer>{x}</answer>") for x in ("44+19+35", "(35 + 44) + 19", "44+19", "2**3")
    ]
    assert told[0] == told[1] == "98 from 19, 35, 44" and told[2] == "63 from 19, 44" and told[3] is None
    lab = get_task("lab-countdown")
    assert lab.extract_answer(Example("0", "K347:14=", "3+4+7"), "7+4+3") == "14 from 347"


@pytest.mark.parametrize(
    ("grader", "completion", "told"),
    [
        ("exact", "hm</think> a b ", "a b"),
        ("number", "so it is 1,250.50", "2501/2"),
        ("choice", "The answer is B.", "B"),
    ],
)
def test_rows_by_columns_tell_answers_where_their_grader_reads_one(grader, completion, told):
    fields = {"data_dir": "rows", "prompt": "{q}", "answer": "a"}
    task = Columns(**fields, grader=grader)
    assert task.extract_answer(Example("0", "?", "x"), completion) == told
    assert Columns(**fields, grader="contains").extract_answer is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples is 0: it must be at least 1"),
        ({"samples": 2, "temperature": 0.0}, "temperature is 0: .* leave samples out for greedy decoding"),
        ({"samples": 2, "top_p": 1.5}, r"top_p is 1\.5: it must be above 0 and at most 1"),
        ({"samples": 2, "seed": -1}, "sample_seed is -1: it must be a whole number"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_settings_have_folders_of_their_own():
    settings = [(4,), (8,), (4, 0.7), (4, 0.7, 0.9), (4, 0.7, 0.95), (4, 0.7, 0.9, 1)]
    assert len({Sampling(*setting).name for setting in settings}) == len(settings)
    assert Sampling(4, 0.7, 0.9, 1).name == "n4-t0.7-p0.9-s1"
