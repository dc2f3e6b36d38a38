"""The task `rows`: any data set by its columns."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from es_jax.tasks import Example, get_task

ROWS = [{"question": f"{i} + {i}?", "result": 2 * i, "unit": ["m", "s"], "note": None} for i in range(6)]
PROMPT = "Q: {question}\nA:"


def write(folder: Path, rows: list[dict[str, Any]], *names: str) -> Path:
    """A folder with the rows under those names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("train.jsonl", "test.jsonl"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            with open(path, "w", encoding="utf-8-sig", newline="") as file:
                lines = csv.DictWriter(file, list(rows[0]))
                lines.writeheader()
                lines.writerows(rows)
        else:
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def task_of(folder: Path, **options: Any) -> Any:
    return get_task(
        "rows", **({"data_dir": folder, "prompt": PROMPT, "answer": "result", "grader": "number"} | options)
    )


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.csv", "data/train-00000-of-00001.parquet"])
def test_columns_of_every_file_become_examples(tmp_path: Path, name: str) -> None:
    rows = [{"question": f"{i} + {i}?", "result": 2 * i} for i in range(3)]
    first, *_, last = task_of(write(tmp_path, rows, name)).train()
    assert first == Example("0", "Q: 0 + 0?\nA:", "0") and last.answer == "4"


def test_a_template_is_messages_or_text_and_values_are_text(tmp_path: Path) -> None:
    rows = [{"a b": "{question} {0.__class__}", "n": 1.5, "list": [1, 2], "question": "?", "result": 3}]
    write(tmp_path, rows)
    (example,) = task_of(tmp_path, prompt="{{x}} {a b}{n} [{list}] {{{question}}}").train()
    assert example.prompt == "{x} {question} {0.__class__}1.5 [1, 2] {?}"
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "{question}"}]
    for prompt in (messages, json.dumps(messages), tuple(messages)):
        (example,) = task_of(tmp_path, prompt=prompt).train()
        assert example.prompt == ({"role": "system", "content": "Be short."}, {"role": "user", "content": "?"})
    assert task_of(tmp_path, prompt="[{question}] {n}").train()[0].prompt == "[?] 1.5"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"prompt": "{qestion}"},
            r"train\.jsonl, row 0: prompt: unknown column 'qestion': did you mean 'question'\? Known: note, ",
        ),
        ({"prompt": "{question.__class__}"}, r"unknown column 'question\.__class__'"),
        ({"prompt": "{question[0]}"}, r"unknown column 'question\[0\]'"),
        ({"prompt": "{question!r}"}, "unknown column 'question!r'"),
        ({"prompt": "{0}"}, "unknown column '0'"),
        ({"prompt": "{note}"}, "row 0: field 'note' is None: it should be text, a number, or a list of them"),
        ({"prompt": [{"role": "user", "content": "{x}"}]}, r"prompt\[0\]\.content: unknown column 'x'"),
        ({"prompt": [{"role": "usr", "content": "{unit}"}]}, r"field 'prompt\[0\]\.role' is 'usr'"),
        ({"answer": "reslt"}, "answer: unknown column 'reslt': did you mean 'result'"),
        ({"answer": "question"}, r"field 'question' is '0 \+ 0\?': it should be a number such as '72'"),
        (
            {"answer": "note", "grader": "exact"},
            "field 'note' is None: it should be the answer, text that is not empty",
        ),
        ({"answer": "result", "grader": "choice"}, "field 'result' is 0: it should be a letter; set choices_column"),
        ({"grader": "choice", "choices_column": "unt"}, "choices_column: unknown column 'unt'"),
        (
            {"grader": "choice", "choices_column": "question"},
            r"field 'question' is '0 \+ 0\?': it should be a list of 2 to 26",
        ),
        ({"test_rows": 6}, r"test_rows is 6, but .*train\.jsonl has 6 rows: leave some"),
    ],
)
def test_a_column_or_value_that_is_not_there_is_named(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        task_of(write(tmp_path, ROWS), **options).train()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_dir": None}, "'rows' has hub None and data_dir None: set exactly one of them"),
        ({"hub": "a/b"}, "has hub 'a/b' and data_dir '?.*: set exactly one of them"),
        ({"data_dir": None, "hub": "pandas"}, "hub is 'pandas': it should be owner/name"),
        ({"prompt": None}, "prompt is None: it should be a template"),
        ({"prompt": ""}, "prompt is '': it should be a template"),
        ({"prompt": "no column"}, "prompt is 'no column': it contains no {column}"),
        ({"prompt": "{question"}, "its '{' names no column; double a brace"),
        ({"prompt": "{} {question}"}, "its '{}' names no column"),
        ({"prompt": '[{"role": "user"'}, "begins like messages but is not JSON"),
        ({"prompt": [{"role": "user"}]}, "it should be a template"),
        ({"answer": None}, "the grader 'number' needs answer: set it to the column"),
        ({"grader": "exakt"}, "unknown grader of the task 'rows' 'exakt': did you mean 'exact'"),
        ({"grader": "paper"}, r"unknown grader of the task 'rows' 'paper'.*FILE\.py:NAME"),
        ({"grader": "no_such.py:fn"}, r"'no_such\.py:fn' cannot be loaded, since "),
        ({"train_split": "test"}, "train_split and test_split are both 'test'"),
        ({"test_rows": 0}, "n is 0"),
        ({"question": 1}, "unknown option of task 'rows' 'question'"),
    ],
)
def test_a_wrong_option_is_named_before_rows_are_read(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises((ValueError, OSError), match=says):
        task_of(tmp_path / "none", **options)


ANSWERS = [  # (grader, reference, completion, reward)
    ("exact", "Paris", " Paris\n", 1),
    ("exact", "Paris", "paris", 0),
    ("exact", "Paris", "<think>Rome?</think>\nParis", 1),
    ("exact", 7, "7", 1),
    ("contains", "Paris", "It is PARIS.", 1),
    ("contains", "Paris", "Pari", 0),
    ("contains", "a.c", "abc", 0),
    ("number", 72, "so 48 + 24 = 72.", 1),
    ("number", "1,250.5", r"\boxed{1250.50}", 1),
    ("number", "so it is\n#### 72", "#### 71", 0),
    ("number", "so it is\n#### 72", "The answer is 72", 1),
    ("number", "0.5", "1/2", 1),
    ("number", 72, "many", 0),
    ("choice", "b", "The answer is (B).", 1),
    ("choice", "B", "A or C", 0),
]


@pytest.mark.parametrize(("grader", "reference", "completion", "reward"), ANSWERS)
def test_graders(tmp_path: Path, grader: str, reference: Any, completion: str, reward: float) -> None:
    write(tmp_path, [{"question": "?", "result": reference}])
    task = task_of(tmp_path, grader=grader)
    (example,) = task.test()
    score = task.score(example, completion)
    assert (score.reward, score.parts) == (reward, {"answer": reward})
    for text in ("", "\0" * 1000, "\ud800", "{question}", "(" * 5000, "</think>" * 1000):
        assert task.score(example, text).reward == 0


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["tape", "glue", "nails"], 1, "B"),
        (["tape", "glue", "nails"], "2", "C"),
        (["tape", "glue", "nails"], "glue", "B"),
        (["1", "2", "3"], "2", "B"),
        (["tape", "glue"], "B", "B"),
        ({"text": ["tape", "glue"], "label": ["1", "2"]}, "2", "B"),
        ({"text": ["tape", "glue"], "label": ["A", "B"]}, "A", "A"),
    ],
)
def test_options_are_listed_and_the_right_one_is_found(tmp_path: Path, options: Any, answer: Any, letter: str) -> None:
    write(tmp_path, [{"question": "?", "options": options, "result": answer}], "train.parquet", "test.parquet")
    task = task_of(tmp_path, grader="choice", choices_column="options", prompt="{question}\n{options}")
    (example,) = task.train()
    texts = options["text"] if isinstance(options, dict) else options
    assert example.prompt == "\n".join(["?", *(f"{label}. {text}" for label, text in zip("ABC", texts, strict=False))])
    assert example.answer == letter
    right = texts["ABC".index(letter)]
    assert task.score(example, f"The answer is {letter}.").reward == task.score(example, f"Answer: {right}").reward == 1
    assert task.score(example, "The answer is D.").reward == 0


@pytest.mark.parametrize(
    ("options", "answer"), [(["a", "b"], 2), (["a", "b"], "C"), (["a", "b"], -1), (["a", "b"], "c")]
)
def test_an_option_that_is_none_is_named(tmp_path: Path, options: list, answer: Any) -> None:
    write(tmp_path, [{"question": "?", "options": options, "result": answer}])
    with pytest.raises(ValueError, match=rf"field 'result' is {answer!r}: it should be a letter, an option's text"):
        task_of(tmp_path, grader="choice", choices_column="options").train()


def test_a_function_of_ones_own_sees_the_columns(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "def near(example, completion):\n    return 1 - abs(float(completion) - example.meta['result']) / 10\n"
    )
    write(tmp_path, ROWS)
    task = task_of(tmp_path, grader=f"{tmp_path}/judge.py:near", answer=None)
    assert task.train()[3].answer is None and task.train()[3].meta == ROWS[3]
    assert task.score(task.train()[3], "4").reward == pytest.approx(0.8)
    assert task_of(tmp_path, grader=f"{tmp_path}/judge.py:near").train()[3].answer == "6"


def test_rows_at_the_end_may_be_for_testing(tmp_path: Path) -> None:
    task = task_of(write(tmp_path, ROWS, "train.csv"), test_rows=2)
    assert [e.answer for e in task.train()] == ["0", "2", "4", "6"] and [e.answer for e in task.test()] == ["8", "10"]
    assert [e.answer for e in task.test(1)] == ["8"]
    with pytest.raises(ValueError, match=r"n is 3, but the test rows of .*train\.csv has 2 examples"):
        task.test(3)
    with pytest.raises(FileNotFoundError, match="has no 'test' split"):
        task_of(tmp_path).test()


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the library itself, which takes a folder for a data set of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"id": f"r{i}", "question": f"{i} + {i}?", "result": 2 * i} for i in range(6)]
    folder = str(write(tmp_path / "set", rows, "data/train-00000-of-00001.parquet"))
    task = task_of(None, hub=folder, train_split="train[:4]", test_split="train[4:]")
    assert [e.id for e in task.train()] == ["r0", "r1", "r2", "r3"] and [e.answer for e in task.test()] == ["8", "10"]
    assert [e.id for e in task_of(None, hub=folder, test_rows=1).test()] == ["r5"]
    with pytest.raises(ValueError, match=r"has no rows for config None, split 'test': .*\['train'\]"):
        task_of(None, hub=folder).test()
    with pytest.raises(ValueError, match=r"has no rows for config 'x', split 'train': .*default"):
        task_of(None, hub=folder, subset="x").train()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("question,result\na,b,c\n", "row 0 has 3 fields, but there are 2 columns: correct"),
        (
            "question,question\na,b\n",
            "has two columns with the same name in its first line, question, question: rename one",
        ),
        ("", "is not CSV: write the file as CSV with names in the first line"),
        ('question,result\n"a,1\n', "line 2 is not CSV"),
        ("question,result\n", "has no rows"),
    ],
)
def test_a_damaged_csv_file_is_told(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"train\.csv.*{says}"):
        task_of(tmp_path).train()


def test_files_that_are_missing_from_a_copy_are_told(tmp_path: Path) -> None:
    write(tmp_path, ROWS, "data/train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match="holds only 1 of 2 files of the split 'train': fetch all"):
        task_of(tmp_path).train()
    write(tmp_path, ROWS, "data/train-00001-of-00002.parquet")
    assert len(task_of(tmp_path).train()) == 12
    write(tmp_path, ROWS, "train.jsonl")
    with pytest.raises(ValueError, match=r"holds train\.jsonl and train-00000-of-00002\.parquet: keep one"):
        task_of(tmp_path).train()
