"""The table of tasks, what every task has in common, and conciseness."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from task_rows import ROWS, write_rows

from es_jax.tasks import TASKS, Example, Score, get_task, response_text
from es_jax.tasks.task import take


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_contract(name: str, tmp_path: Path) -> None:
    task = get_task(name, data_dir=write_rows(tmp_path, name)) if name in ROWS else get_task(name)
    assert task.name == name
    for split in (task.train, task.test):
        examples = split(5)
        assert split(2) == examples[:2] and len(examples) == 5
        assert len({example.id for example in examples}) == 5
        for example in examples:
            for completion in ("", "yes", "\0" * 1000, "<answer>" * 1000, "\ud800", example.answer or ""):
                score = task.score(example, completion)
                assert isinstance(score.reward, float)
                assert all(isinstance(part, float) for part in score.parts.values()) and "answer" in score.parts
    with pytest.raises(ValueError, match="n is 0"):
        task.train(0)


def test_tasks_import_no_jax() -> None:
    code = "import sys, es_jax.tasks; sys.exit('jax' in sys.modules or 'pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "countdwn",
            {},
            r"unknown task 'countdwn': did you mean 'countdown'.*Known: arc-challenge, conciseness, countdown",
        ),
        ("zzz", {}, r"unknown task 'zzz'\. Known: arc-challenge, conciseness, countdown, gsm8k"),
        (
            "countdown",
            {"datadir": "x"},
            r"unknown option of task 'countdown' 'datadir': did you mean 'data_dir'",
        ),
        ("conciseness", {"grader": "paper"}, r"unknown option of task 'conciseness' 'grader'"),
        ("countdown", {"grader": "strickt"}, r"unknown grader 'strickt': did you mean 'strict'\?"),
        ("countdown", {"seed": 1.5}, r"seed is 1\.5: it should be a whole number"),
    ],
)
@pytest.mark.unchecked
def test_get_task_errors(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task(name, **options)


def test_take() -> None:
    two = [Example("a", "?", None), Example("b", "?", None)]
    assert take(two, None, source="it") == two
    with pytest.raises(ValueError, match="n is 3, but it has 2 examples: ask for at most 2"):
        take(two, 3, source="it")
    with pytest.raises(ValueError, match="it is empty"):
        take([], None, source="it")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("plain", "end"),
        (({"role": "user", "content": "q"},), "end"),
        (({"role": "user", "content": "q"}, {"role": "assistant", "content": "start "}), "start end"),
        (({"role": "assistant", "content": "start "}, {"role": "user", "content": "q"}), "end"),
    ],
)
def test_response_text(prompt: str | tuple, text: str) -> None:
    assert response_text(Example("0", prompt, None), "end") == text


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("Earth", Score(0.0, {"answer": 1.0, "length": 5.0})),
        ("EARTH!", Score(-1.0, {"answer": 1.0, "length": 6.0})),
        ("Mars", Score(-1.0, {"answer": 0.0, "length": 4.0})),
        ("Venus", Score(0.0, {"answer": 0.0, "length": 5.0})),
        ("", Score(-5.0, {"answer": 0.0, "length": 0.0})),
        (" Earth\n", Score(-2.0, {"answer": 1.0, "length": 7.0})),
        ("火星", Score(-3.0, {"answer": 0.0, "length": 2.0})),
    ],
)
def test_conciseness(completion: str, score: Score) -> None:
    task = get_task("conciseness")
    example = Example("0", "Which planet do we live on?", "Earth")
    assert task.score(example, completion) == score


def test_conciseness_counts() -> None:
    task = get_task("conciseness")
    assert (len(task.train()), len(task.test())) == (24, 16)
    assert not {e.prompt[0]["content"] for e in task.train()} & {e.prompt[0]["content"] for e in task.test()}
    with pytest.raises(ValueError, match="n is 17, but the built-in test split of conciseness has 16"):
        task.test(17)


def test_conciseness_rows(tmp_path: Path) -> None:
    opened = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is "}]
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": opened, "reward_model": {"ground_truth": 4}}]))
    task = get_task("conciseness", data_dir=tmp_path)
    (example,) = task.test()
    assert task.score(example, "4") == Score(-6.0, {"answer": 1.0, "length": 7.0})
