"""docs/grading.md and docs/tasks.md against the code: every row of the grading tables, the examples, and all tasks."""

import re
from pathlib import Path

import pytest

from es_jax.tasks import TASKS, Example, get_task

DOCS = Path(__file__).resolve().parents[2] / "docs"
USE, TEXT = (DOCS / "tasks.md").read_text(), (DOCS / "grading.md").read_text()
TABLES = dict(re.findall(r"^### (\S+)\n(.*?)(?=^#|\Z)", TEXT, flags=re.M | re.S))
ROW = re.compile(r"^\| `(.*)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| .* \|$", flags=re.M)
ROWS = [(task, *row) for task, text in TABLES.items() for row in ROW.findall(text)]
READ = TEXT.partition("## What the robust grader reads\n")[2].partition("\n## ")[0]
READS = re.findall(r"^\| `(.*)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", READ, flags=re.M)


def parts_of(task: str, grader: str, completion: str, answer: str) -> dict[str, float]:
    example = Example("0", "?", answer, {"numbers": (44, 19, 35), "target": answer} if task == "countdown" else {})
    return dict(get_task(task, grader=grader).score(example, completion.replace("\\n", "\n")).parts)


@pytest.mark.parametrize(("task", "completion", "answer", "paper", "form", "strict", "robust"), ROWS)
def test_row(task: str, completion: str, answer: str, paper: str, form: str, strict: str, robust: str) -> None:
    verdicts = {"paper": float(paper), "strict": float(strict), "robust": float(robust)}
    for grader, verdict in verdicts.items():
        parts = {"answer": verdict, "format": float(form), **verdicts}
        assert parts_of(task, grader, completion, answer) == parts


@pytest.mark.parametrize(("completion", "task", "answer", "paper", "strict", "robust"), READS)
def test_what_the_robust_grader_reads(
    completion: str, task: str, answer: str, paper: str, strict: str, robust: str
) -> None:
    verdicts = {"paper": float(paper), "strict": float(strict), "robust": float(robust)}
    parts = parts_of(task, "robust", completion, answer)
    assert {name: parts[name] for name in verdicts} == verdicts and parts["answer"] == verdicts["robust"]


def test_every_task_with_graders_has_a_table() -> None:
    assert set(TABLES) == {name for name in TASKS if hasattr(get_task(name), "grader")}
    assert all(len([row for row in ROWS if row[0] == name]) >= 5 for name in TABLES)
    assert len(READS) >= 20 and len(ROWS) + len(READS) == TEXT.count("\n| `")


def test_the_table_of_tasks_is_whole() -> None:
    section = USE.partition("## The tasks that are here\n")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([a-z0-9…-]+)` \|", section, flags=re.M)
    assert set(named) == {name for name in TASKS if not name.startswith("lab-")} | {"lab-…"}


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", USE + TEXT, flags=re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs", "exec"), {})  # our own text, not a model's
