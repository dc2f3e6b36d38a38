"""Rows of the published data sets: what becomes of them, what is said of bad ones, and which split is which."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from task_rows import ROWS, write, write_rows

from es_jax.tasks import Score, get_task

DATA = Path(os.environ.get("ES_JAX_DATA", Path(__file__).resolve().parents[3] / "shared/data"))


def load(folder: Path, task: str, row: dict[str, Any], **options: Any) -> Any:
    write(folder, "test", [ROWS[task](0), row])
    write(folder, "validation", [ROWS[task](i) for i in range(20, 30)])
    return get_task(task, data_dir=folder, **options).test()[1]


BAD = [  # (task, field, what it holds, the field that is named, what is said of it)
    ("gsm8k", "question", "", "question", "''"),
    ("gsm8k", "question", ["x"], "question", r"\['x'\]"),
    ("gsm8k", "answer", None, "answer", "None"),
    ("gsm8k", "answer", "it is 7", "answer", "'it is 7'"),
    ("gsm8k", "answer", "#### many", "answer", "'#### many'"),
    ("gsm8k", "answer", 72, "answer", "72"),
    ("proofwriter", "theory", None, "theory", "None"),
    ("proofwriter", "question", " ", "question", "' '"),
    ("proofwriter", "answer", "Maybe", "answer", "'Maybe'"),
    ("proofwriter", "answer", True, "answer", "True"),
    ("hellaswag", "ctx", None, "ctx", "None"),
    ("hellaswag", "endings", ["a", "b", "c"], "endings", r"\['a', 'b', 'c'\]"),
    ("hellaswag", "endings", ["a", "b", "c", ""], "endings", r"\['a', 'b', 'c', ''\]"),
    ("hellaswag", "label", "", "label", "''"),
    ("hellaswag", "label", "4", "label", "'4'"),
    ("hellaswag", "label", [0], "label", r"\[0\]"),
    ("piqa", "goal", None, "goal", "None"),
    ("piqa", "sol2", 2, "sol2", "2"),
    ("piqa", "label", "0", "label", "'0'"),
    ("piqa", "label", -1, "label", "-1"),
    ("piqa", "label", True, "label", "True"),
    ("arc-challenge", "question", None, "question", "None"),
    ("arc-challenge", "options", "a, b", "options", "'a, b'"),
    ("arc-challenge", "options", ["a"], "options", r"\['a'\]"),
    ("arc-challenge", "option_labels", ["A", "B"], "option_labels", r"\['A', 'B'\]"),
    ("arc-challenge", "option_labels", ["A", "B", "B"], "option_labels", r"\['A', 'B', 'B'\]"),
    ("arc-challenge", "answer", "D", "answer", "'D'"),
    ("mmlu-pro", "options", ["x"] * 11, "options", r"\['x', 'x', 'x', 'x', 'x', 'x', \.\.\.\]"),
    ("mmlu-pro", "answer", "D", "answer", "'D'"),
    ("mmlu-pro", "category", None, "category", "None"),
    ("mmlu-pro", "category", "music", "category", "'music'"),
]


@pytest.mark.parametrize(("task", "field", "value", "name", "message"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, task: str, field: str, value: object, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"test\.jsonl, row 1: field '{name}' is {message}: it should be "):
        load(tmp_path, task, ROWS[task](1) | {field: value})


BAD_VERL = [("gsm8k", "many"), ("proofwriter", "Maybe"), ("hellaswag", "4"), ("piqa", "0"), ("mmlu-pro", "K")]


@pytest.mark.parametrize(("task", "answer"), BAD_VERL)
def test_a_bad_verl_row_is_named(tmp_path: Path, task: str, answer: str) -> None:
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": answer}}
    with pytest.raises(ValueError, match=rf"row 1: field 'reward_model\.ground_truth' is '{answer}': it should be "):
        load(tmp_path, task, row)


def test_a_verl_row_brings_its_prompt(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Two or three?"}, {"role": "assistant", "content": "The answer"}]
    example = load(tmp_path, "arc-challenge", {"prompt": prompt, "reward_model": {"ground_truth": "C"}})
    assert example.prompt == tuple(prompt) and example.answer == "C"
    parts = dict.fromkeys(("answer", "format", "paper", "strict", "robust"), 1.0)
    assert get_task("arc-challenge").score(example, " is (C)") == Score(1.0, parts)


@pytest.mark.parametrize(
    ("task", "row", "answer"),
    [
        ("arc-challenge", {"id": "x", "question": "?", "answerKey": "2",
                           "choices": {"text": ["p", "q", "r"], "label": ["1", "2", "3"]}}, "B"),
        ("piqa", {"goal": "?", "sol1": "p", "sol2": "q", "label": 1}, "2"),
        ("piqa", {"goal": "?", "sol1": "p", "sol2": "q", "label": "1"}, "1"),
        ("hellaswag", ROWS["hellaswag"](0) | {"label": 3}, "3"),
        ("gsm8k", {"question": "?", "answer": "so\n#### 1,200"}, "1,200"),
        ("gsm8k", {"question": "?", "answer": "so\n##### 72"}, "72"),
        ("gsm8k", {"question": "?", "answer": " 72 "}, "72"),
        ("proofwriter", ROWS["proofwriter"](1) | {"answer": "false"}, "False"),
    ],
)  # fmt: skip
def test_the_hubs_fields(tmp_path: Path, task: str, row: dict, answer: str) -> None:
    assert load(tmp_path, task, row).answer == answer


def test_prompts_show_the_question_and_its_options(tmp_path: Path) -> None:
    (message,) = load(tmp_path, "hellaswag", ROWS["hellaswag"](7)).prompt
    text = message["content"]
    assert "Making tea: A man 7 boils water. He\n" in text and "[" not in text
    assert "\n0. pours it.\n1. eats it.\n2. paints it.\n3. sells it.\n" in text


def test_worked_examples_are_of_the_category_and_never_the_question(tmp_path: Path) -> None:
    rows = [ROWS["mmlu-pro"](i) for i in range(12)]
    write(tmp_path, "validation", rows)
    for row, example in zip(rows, get_task("mmlu-pro", data_dir=tmp_path).test(), strict=True):
        *worked, last = example.prompt[0]["content"].split("Question: ")[1:]
        assert len(worked) == 5 and last.startswith(row["question"]) and "Answer:" not in last
        assert all(x.rstrip().endswith("The answer is (A).") and "A: One" not in x for x in worked)
        same = {r["question"] for r in rows if r["category"] == row["category"]} - {row["question"]}
        assert {x.partition("\n")[0] for x in worked} == same


BAD_WORKED = [  # (field of a validation row, what it holds, what is said of it)
    ("answer", "Z", "'Z'"),
    ("question", "", "''"),
    ("category", None, "None"),
    ("cot_content", None, "None"),
    ("cot_content", "", "''"),
    ("cot_content", "A: ", "'A: '"),
    ("cot_content", ["One"], r"\['One'\]"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_WORKED)
def test_a_bad_worked_example_is_named_by_its_own_file(tmp_path: Path, field: str, value: object, message: str) -> None:
    rows = [ROWS["mmlu-pro"](i) for i in range(10)]
    rows[1] |= {field: value}
    write(tmp_path, "test", [ROWS["mmlu-pro"](20)])
    write(tmp_path, "validation", rows)
    with pytest.raises(
        ValueError, match=rf"validation\.jsonl, row 1: field '{field}' is {message}: it should be "
    ) as e:
        get_task("mmlu-pro", data_dir=tmp_path).test()
    assert "test.jsonl" not in str(e.value)


def test_a_question_needs_five_worked_examples_and_no_worked_answer_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "test", [ROWS["mmlu-pro"](i) | {"cot_content": ""} for i in (20, 21)])
    write(tmp_path, "validation", [ROWS["mmlu-pro"](i) for i in range(10)])
    for example in get_task("mmlu-pro", data_dir=tmp_path).test():
        assert example.prompt[0]["content"].count("\nAnswer: One more than") == 5
    write(tmp_path, "validation", [ROWS["mmlu-pro"](i) for i in range(9)])
    message = r"test\.jsonl, row 1: field 'category' is 'math': .* 5 worked .* \(this one has 4; .* enough are: law\)"
    with pytest.raises(ValueError, match=message):
        get_task("mmlu-pro", data_dir=tmp_path).test()
    write(tmp_path, "validation", [ROWS["mmlu-pro"](i) for i in range(8)])
    with pytest.raises(ValueError, match=r"row 0: field 'category' is 'law': .* enough are: none\)"):
        get_task("mmlu-pro", data_dir=tmp_path).test()


def test_validation_rows_that_are_asked_have_four_worked_examples(tmp_path: Path) -> None:
    write(tmp_path, "validation", [ROWS["mmlu-pro"](i) for i in range(10)])
    examples = get_task("mmlu-pro", data_dir=tmp_path).test()
    assert [example.prompt[0]["content"].count("Answer: ") for example in examples] == [4] * 10


def test_train_and_test_never_share_a_file(tmp_path: Path) -> None:
    for task in ROWS:
        folder = write_rows(tmp_path / task, task)
        rows = get_task(task, data_dir=folder)
        train, test = ({str(e.prompt) for e in examples} for examples in (rows.train(), rows.test()))
        assert not train & test
        (folder / "test.jsonl").unlink()
        assert rows.test()
        (folder / "train.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match=r"where validation\.jsonl is the test split: add a train split"):
            rows.train()
        (folder / "validation.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match="has no 'test' split"):
            rows.test()


def test_ids_are_unique_and_counts_are_checked(tmp_path: Path) -> None:
    proofwriter = get_task("proofwriter", data_dir=write_rows(tmp_path, "proofwriter"))
    assert len({e.id for e in proofwriter.test()}) == 12 and proofwriter.test(3) == proofwriter.test()[:3]
    with pytest.raises(ValueError, match=r"n is 13, but .*test\.jsonl has 12 examples: ask for at most 12"):
        proofwriter.test(13)
    with pytest.raises(ValueError, match="n is 0"):
        proofwriter.test(0)


@pytest.mark.parametrize("task", ROWS)
def test_offline_says_what_to_do(task: str) -> None:
    with pytest.raises(OSError, match=r"cannot be fetched from the Hugging Face hub .*set data_dir to it"):
        get_task(task).test()


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of `datasets`, and that a bad row of the hub is named too."""
    calls = []

    def load_dataset(*args: Any, **options: Any) -> list[dict]:
        calls.append((*args, *options.values()))
        rows = [ROWS["mmlu-pro"](i) for i in range(10)]
        return rows if options["split"] == "validation" else [*rows, {"question": "?"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    mmlu_pro = get_task("mmlu-pro")
    assert len(mmlu_pro.test(10)) == 10
    assert set(calls) == {("TIGER-Lab/MMLU-Pro", None, split, None) for split in ("test", "validation")}
    with pytest.raises(ValueError, match="TIGER-Lab/MMLU-Pro, split test, row 10: field 'options' is None"):
        mmlu_pro.test()
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: [ROWS["mmlu-pro"](0), {}])
    with pytest.raises(ValueError, match="TIGER-Lab/MMLU-Pro, split validation, row 1: field 'options' is None"):
        mmlu_pro.test(1)


REAL = [  # (task, folder, split, rows)
    ("gsm8k", "gsm8k", "train", 200),
    ("gsm8k", "gsm8k", "test", 500),
    ("proofwriter", "proofwriter", "train", 200),
    ("arc-challenge", "arc_challenge", "train", 299),
    ("arc-challenge", "arc_challenge", "test", 1172),
    ("mmlu-pro", "mmlu_pro", "test", 70),
    ("piqa", "piqa", "test", 1838),
]


@pytest.mark.parametrize(("task", "folder", "split", "count"), REAL)
def test_real_rows(task: str, folder: str, split: str, count: int) -> None:
    """The right answer as it is asked for earns all there is; a reference solution of GSM8K does so as it stands."""
    if not (DATA / folder).exists():
        pytest.skip(f"no rows at {DATA / folder}: set ES_JAX_DATA to the folder that holds {folder}")
    grader = get_task(task, data_dir=DATA / folder)
    examples = getattr(grader, split)()
    assert len(examples) == len({e.id for e in examples}) == count
    for e in examples:
        form = {"gsm8k": e.meta.get("answer"), "proofwriter": f"\nAnswer: {e.answer}"}
        choices = grader.choices(e) if task not in form else None
        text = choices.options[choices.right] if choices else form[task]
        assert set(grader.score(e, text).parts.values()) == {1.0}, e
        if choices:
            assert sum(grader.score(e, option).reward for option in choices.options) == 1
