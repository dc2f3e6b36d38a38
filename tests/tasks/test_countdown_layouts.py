"""The layouts of Countdown's rows: one problem, told in four ways, is one example."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from es_jax.tasks import get_task

ASKED = [{"role": "user", "content": "Make 24 of 4, 6, 1."}]
PROBLEM = {"target": 24, "numbers": [4, 6, 1]}
LAYOUTS = {
    "columns": {"target": 24, "nums": [4, 6, 1]},
    "columns, by their other name": {"id": "c", **PROBLEM},
    "record": {"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": PROBLEM}},
    "record beside other facts": {
        "data_source": "countdown", "prompt": ASKED, "ability": "math", "extra_info": {"index": 3, "split": "train"},
        "reward_model": {"style": "rule", "ground_truth": PROBLEM},
    },
    "record and the same in extra_info": {
        "prompt": ASKED, "extra_info": {"numbers": [1, 4, 6], "target": "24.0"},
        "reward_model": {"style": "rule", "ground_truth": PROBLEM},
    },
    "extra_info": {"prompt": ASKED, "reward_model": {"ground_truth": "4 * 6 * 1"}, "extra_info": PROBLEM},
}  # fmt: skip


def read(folder: Path, rows: list[dict[str, Any]], ending: str = "jsonl") -> Any:
    path = folder / f"train.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if ending == "jsonl" else json.dumps(rows))
    return get_task("countdown", data_dir=folder)


@pytest.mark.parametrize("ending", ["parquet", "json", "jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_problem(layout: str, ending: str, tmp_path: Path) -> None:
    row = LAYOUTS[layout]
    task = read(tmp_path, [row, row], ending)
    first, second = task.train()
    assert sorted(first.meta["numbers"]) == [1, 4, 6] and float(first.meta["target"]) == 24
    assert first.answer == ("4 * 6 * 1" if layout == "extra_info" else None)
    assert first.id == row.get("id", "0") and second.id == (f"{row['id']}#1" if "id" in row else "1")
    right = "so</think>\n<answer>(6 - 1 + 1) * 4</answer>", "so</think>\n<answer>4 * 6 * 1</answer>"
    assert [task.score(first, text).reward for text in right] == [0.1, 1.1]
    if "prompt" in row:
        assert list(first.prompt) == ASKED and first.meta.get("index") == row.get("extra_info", {}).get("index")
    else:
        system, user, opening = first.prompt
        assert "4, 6, 1" in user["content"] and "target is 24" in user["content"]
        assert system["role"] == "system" and opening["content"].endswith("<think>")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_layouts_may_be_mixed(ending: str, tmp_path: Path) -> None:
    """Every row then has all columns, and nothing in those that are not its own."""
    names = {name for row in LAYOUTS.values() for name in row}
    rows = [
        dict.fromkeys(sorted(names)) | LAYOUTS[layout]
        for layout in ("columns", "columns, by their other name", "record")
    ]
    train = read(tmp_path, rows, ending).train()
    assert [sorted(row.meta["numbers"]) for row in train] == [[1, 4, 6]] * 3


TRUTH = "reward_model.ground_truth"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"nums": [4, 6], "goal": 24},
            "its columns are nums, goal: a row must have `nums` and `target`; or `prompt`, and",
        ),
        ({"prompt": ASKED, "answer": "24"}, "its columns are prompt, answer: a row must have"),
        (
            {"prompt": ASKED, "reward_model": {"ground_truth": "24"}, "extra_info": {"index": 1}},
            "its columns are prompt,",
        ),
        ({"nums": [], "target": 24}, "field 'nums' is []: it should be a list of at least one whole number"),
        ({"nums": [4, -6], "target": 24}, "field 'nums' is [4, -6]"),
        ({"nums": [4, 6.5], "target": 24}, "field 'nums' is [4, 6.5]"),
        ({"nums": "4, 6", "target": 24}, "field 'nums' is '4, 6'"),
        ({"nums": [4, 6], "target": "many"}, "field 'target' is 'many': it should be a decimal number"),
        ({"nums": [4, 6], "target": None}, "field 'target' is None"),
        ({"prompt": ASKED, "reward_model": {"ground_truth": {"target": 24}}}, f"field '{TRUTH}.numbers' is None"),
        ({"prompt": ASKED, "reward_model": {"ground_truth": {"numbers": [24]}}}, f"field '{TRUTH}.target' is None"),
        ({"prompt": "Make 24.", "reward_model": {"ground_truth": PROBLEM}}, "field 'prompt' is 'Make 24.'"),
        ({"prompt": ASKED, "reward_model": {"ground_truth": PROBLEM}, "extra_info": [1]}, "field 'extra_info' is [1]"),
        (
            {"prompt": ASKED, "reward_model": {"ground_truth": PROBLEM}, "extra_info": PROBLEM | {"target": 25}},
            f"field '{TRUTH}' is {{'numbers': [4, 6, 1], 'target': 24}}: it should be the same as the problem in",
        ),
        (
            {"prompt": ASKED, "reward_model": {"ground_truth": PROBLEM}, "extra_info": PROBLEM | {"numbers": [4, 6]}},
            "it should be the same as the problem in extra_info",
        ),
    ],
)
def test_a_row_that_is_not_one_is_named(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, [LAYOUTS["columns"], row]).train()
    assert "train.jsonl, row 1: " in str(error.value) and says in str(error.value)


PUBLIC = [{"target": 2 * a + b, "nums": [a, a, b]} for a in range(1, 9) for b in range(1, 9)]  # as the sets of the hub


def copied(folder: Path, *names: str) -> Path:
    (folder / "data").mkdir(parents=True)
    size = len(PUBLIC) // len(names)
    for at, name in enumerate(names):
        table = pyarrow.Table.from_pylist(PUBLIC[at * size : (at + 1) * size])
        pyarrow.parquet.write_table(table, folder / "data" / name)
    return folder


@pytest.mark.parametrize("source", ["hub", "data_dir"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_data_set_with_a_train_split_alone_is_divided(
    source: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No set of numbers is both for training and for testing; `datasets` takes the folder for one of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = copied(tmp_path / "set", *(f"train-0000{at}-of-0000{parts}.parquet" for at in range(parts)))
    task = get_task("countdown", **{source: str(folder)})
    train, test = task.train(), task.test()
    assert len(train) + len(test) == len(PUBLIC) and min(len(train), len(test)) > 16
    assert not {tuple(sorted(e.meta["numbers"])) for e in train} & {tuple(sorted(e.meta["numbers"])) for e in test}
    assert task.train(3) == train[:3] and task.test(5) == test[:5]
    for example in train[:3]:
        a, _, b = numbers = example.meta["numbers"]
        row = {"target": int(example.meta["target"]), "nums": list(numbers)}
        assert PUBLIC[int(example.id)] == row and f"{a}, {a}, {b}" in example.prompt[1]["content"]
        assert task.score(example, f"so</think>\n<answer>{a} + {a} + {b}</answer>").reward == 1.1
    with pytest.raises(ValueError, match=r"n is 1000, but the test part of .* has"):
        task.test(1000)


def test_a_data_set_with_both_splits_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = copied(tmp_path / "set", "train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    for options in ({"hub": str(folder)}, {"data_dir": folder}):
        task = get_task("countdown", **options)
        assert len(task.train()) == len(task.test()) == len(PUBLIC) // 2
    with pytest.raises(ValueError, match="hub is 'a/b' and data_dir 'x': set only one of them"):
        get_task("countdown", hub="a/b", data_dir="x")


def test_a_bad_row_of_a_divided_set_is_named(tmp_path: Path) -> None:
    folder = copied(tmp_path / "set", "train-00000-of-00001.parquet")
    table = pyarrow.Table.from_pylist([*PUBLIC, {"target": 3, "nums": []}])
    pyarrow.parquet.write_table(table, folder / "data/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet, row 64: field 'nums' is \[\]: it should be"):
        get_task("countdown", data_dir=folder).test()
