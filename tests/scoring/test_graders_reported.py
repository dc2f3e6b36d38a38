"""What an evaluation reports of the three graders, whichever the task is set to."""

import numpy as np
import pytest

from es_jax.scoring import heldout
from es_jax.scoring.grading import Graded
from es_jax.tasks import Example, get_task

COMPLETIONS = ["#### 72", "####72", "72 of 80", "#### 72/0", "48, then 72"]
VERDICTS = {"right": [1, 1, 1, 1, 0], "strict": [1, 0, 0, 0, 0], "robust": [1, 1, 0, 0, 1]}


def results(task: str, completions: list[str], answer: str, **options: str):
    grader, example = get_task(task, **options), Example("0", "?", answer)
    return heldout.results_of([Graded(example, x, grader.score(example, x), 5, False) for x in completions], None)


@pytest.mark.parametrize(("grader", "view"), [("paper", "right"), ("strict", "strict"), ("robust", "robust")])
def test_all_three_are_reported_and_the_reward_is_of_the_one_that_is_set(grader: str, view: str) -> None:
    found = results("gsm8k", COMPLETIONS, "72", grader=grader)
    assert {name: getattr(found, name).tolist() for name in VERDICTS} == VERDICTS
    assert found.well_formed is not None and found.well_formed.tolist() == [1, 1, 0, 0, 0]
    np.testing.assert_allclose(found.reward, np.array(VERDICTS[view]) + 0.1 * found.well_formed)
    assert set(found.parts) == {"format"}


def test_a_task_with_one_grader_has_its_verdict_three_times() -> None:
    found = results("lab-add", ["12", "13", "x"], "12")
    assert found.right.tolist() == found.strict.tolist() == found.robust.tolist() == [1, 0, 0]


@pytest.mark.parametrize("task", ["countdown", "hellaswag", "mmlu-pro"])
def test_results_by_other_rules_are_of_other_rows(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def digests() -> list[str]:
        rows = [Example("0", "?", "1")], [[1, 2]]
        return [heldout.HeldOut(get_task(name), *rows).digest for name in (task, "lab-add", "conciseness")]

    before = digests()
    monkeypatch.setattr(heldout, "RULES", heldout.RULES + 1)
    after = digests()
    assert before[0] != after[0] and before[1:] == after[1:]
