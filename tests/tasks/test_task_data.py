"""Rows on disk: what is read, and what is said about rows and files that are wrong."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from es_jax.tasks import get_task
from es_jax.tasks.rows import read_examples, read_rows, rows_folder

ROW = {
    "id": "r0",
    "data_source": "countdown",
    "prompt": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>"}],
    "reward_model": {"ground_truth": "1 + 2", "style": "rule"},
    "extra_info": {"numbers": [1, 2], "target": "3", "index": 7},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """A copy of ROW with one field replaced, given by its path ("extra_info.target"); None removes it."""
    row = json.loads(json.dumps(ROW))
    *parents, last = path.split(".")
    place = row
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return row


def write(folder: Path, rows: list[Any], name: str = "train.jsonl") -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["train.parquet", "train.json", "train.jsonl"])
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    write(tmp_path, [ROW, changed("prompt", [{"role": "user", "content": "a\u2028b"}])], name)
    first, second = get_task("countdown", data_dir=tmp_path).train()
    assert first.id == "r0" and first.answer == "1 + 2"
    assert first.prompt == tuple(ROW["prompt"])
    assert first.meta == {"numbers": (1, 2), "target": "3", "index": 7, "data_source": "countdown"}
    assert second.prompt[0]["content"] == "a\u2028b"


def test_lines_in_a_json_file(tmp_path: Path) -> None:
    write(tmp_path, [ROW, ROW], "train.jsonl").rename(tmp_path / "train.json")
    assert len(get_task("countdown", data_dir=tmp_path).train()) == 2


def test_without_id_the_row_number_is_the_id(tmp_path: Path) -> None:
    write(tmp_path, [changed("id", None), changed("id", 12)])
    assert [example.id for example in read_examples(tmp_path, "train")] == ["0", "12"]


@pytest.mark.parametrize("task", ["countdown", "conciseness", "gsm8k"])
def test_ids_are_unique(tmp_path: Path, task: str) -> None:
    names = ["a", "a", "a", "a#5", "1", "a", None]
    rows = [changed("id", name) | {"reward_model": {"ground_truth": "3"}} for name in names]
    write(tmp_path, rows)
    ids = [example.id for example in get_task(task, data_dir=tmp_path).train()]
    assert ids == ["a", "a#1", "a#2", "a#5", "1", "a#5#5", "6"]


@pytest.mark.parametrize(("target", "text"), [("27.4", "27.4"), (-11, "-11"), (2.5, "2.5"), ("007", "007")])
def test_targets(tmp_path: Path, target: object, text: str) -> None:
    write(tmp_path, [changed("extra_info.target", target)])
    assert get_task("countdown", data_dir=tmp_path).train()[0].meta["target"] == text


def test_countdown_needs_no_ground_truth_and_others_do(tmp_path: Path) -> None:
    write(tmp_path, [changed("reward_model.ground_truth", None)])
    assert get_task("countdown", data_dir=tmp_path).train()[0].answer is None
    with pytest.raises(ValueError, match=r"row 0: field 'reward_model\.ground_truth' is None"):
        read_examples(tmp_path, "train")


BAD_FIELDS = [  # (path in the row, what it holds, the field that is named, what was found)
    ("prompt", None, "prompt", "None"),
    ("prompt", "text", "prompt", "'text'"),
    ("prompt", [], "prompt", r"\[\]"),
    ("prompt", ["hi"], r"prompt\[0\]", "'hi'"),
    ("prompt", [{"role": "usr", "content": ""}], r"prompt\[0\]\.role", "'usr'"),
    ("prompt", [{"role": "user"}], r"prompt\[0\]\.content", "None"),
    ("prompt", [{"role": "user", "content": ["a"]}], r"prompt\[0\]\.content", r"\['a'\]"),
    ("prompt", [{"role": "user", "content": "a", "name": "b"}], r"prompt\[0\]\.name", "'b'"),
    ("reward_model", None, "reward_model", "None"),
    ("reward_model", "1 + 2", "reward_model", r"'1 \+ 2'"),
    ("reward_model.ground_truth", "", r"reward_model\.ground_truth", "''"),
    ("reward_model.ground_truth", {"a": 1}, r"reward_model\.ground_truth", "{'a': 1}"),
    ("extra_info", [1], "extra_info", r"\[1\]"),
    ("data_source", 3, "data_source", "3"),
    ("id", 1.5, "id", "1.5"),
    ("id", True, "id", "True"),
]


@pytest.mark.parametrize(("path", "value", "field", "message"), BAD_FIELDS)
def test_a_bad_row_is_named(tmp_path: Path, path: str, value: object, field: str, message: str) -> None:
    write(tmp_path, [ROW, ROW, changed(path, value)])
    with pytest.raises(ValueError, match=rf"train\.jsonl, row 2: field '{field}' is {message}: it should be "):
        read_examples(tmp_path, "train")


BAD_EXTRA = [
    ("numbers", None, "None"),
    ("numbers", [], r"\[\]"),
    ("numbers", "1, 2", "'1, 2'"),
    ("numbers", [1, 2.0], r"\[1, 2\.0\]"),
    ("numbers", [1, -2], r"\[1, -2\]"),
    ("numbers", [1, True], r"\[1, True\]"),
    ("target", None, "None"),
    ("target", "many", "'many'"),
    ("target", "1/2", "'1/2'"),
    ("target", "1e999999999", "'1e999999999'"),
    ("target", "٣", "'٣'"),
    ("target", True, "True"),
    ("target", float("nan"), "nan"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_EXTRA)
def test_a_bad_countdown_row_is_named(tmp_path: Path, name: str, value: object, message: str) -> None:
    write(tmp_path, [ROW, changed(f"extra_info.{name}", value)])
    with pytest.raises(ValueError, match=rf"row 1: field 'extra_info\.{name}' is {message}: it should be "):
        get_task("countdown", data_dir=tmp_path).train()


def test_missing_folder_says_where_and_what(tmp_path: Path) -> None:
    (tmp_path / "countdwn").mkdir()
    with pytest.raises(FileNotFoundError, match=r"does not exist.*test\.parquet.*holds countdwn"):
        get_task("countdown", data_dir=tmp_path / "countdown" / "rows").test()


def test_missing_file_lists_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, [ROW])
    message = (
        r"no 'test' split: looked for one of test\.parquet, test\.json, test\.jsonl, test\.csv; it holds train\.jsonl"
    )
    with pytest.raises(FileNotFoundError, match=message):
        get_task("countdown", data_dir=str(tmp_path)).test()


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl, which is a file: give the folder"):
        get_task("countdown", data_dir=write(tmp_path, [ROW])).train()


def test_two_files_for_one_split(tmp_path: Path) -> None:
    write(tmp_path, [ROW])
    write(tmp_path, [ROW], "train.json")
    with pytest.raises(ValueError, match=r"train\.json and train\.jsonl: keep one"):
        get_task("countdown", data_dir=tmp_path).train()


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing", b"not parquet at all, though long enough PAR1"])
def test_corrupt_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.parquet is damaged or not parquet: fetch") as caught:
        get_task("countdown", data_dir=tmp_path).train()
    assert "\n" not in str(caught.value)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, [ROW] * 50, "train.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged or not parquet"):
        read_rows(path)


def test_flipped_bytes_in_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, [ROW] * 50, "train.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(255 - byte for byte in whole[4:60]) + whole[60:])
    with pytest.raises(ValueError, match="is damaged or not parquet"):
        read_rows(path)


BAD_FILES = [
    ("train.json", b"", "has no rows"),
    ("train.json", b"[]", "has no rows"),
    ("train.jsonl", b"\n\n", "has no rows"),
    ("train.json", b"[1]", "row 0 is 1: it must be an object"),
    ("train.json", b"[{]", r"train\.json: .* is not JSON"),
    ("train.jsonl", b"{}\n\n{}\n", r"row 1: '' is not JSON"),
    ("train.jsonl", b"{}\n{", r"row 1: '\{' is not JSON"),
    ("train.jsonl", b"[" * 100_000, r"row 0: .* is not JSON"),
    ("train.jsonl", b'{"a": "\xff"}', "is not UTF-8 text"),
    ("train.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"row 0: .* is not JSON"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_empty_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([ROW]).slice(0, 0)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet has no rows"):
        get_task("countdown", data_dir=tmp_path).train()


def test_the_folder_of_a_task(tmp_path: Path) -> None:
    for name in ("gsm8k", "arc_challenge"):
        (tmp_path / name).mkdir()
    assert rows_folder(tmp_path, "gsm8k") == tmp_path / "gsm8k"
    assert rows_folder(tmp_path, "arc-challenge") == tmp_path / "arc_challenge"
    with pytest.raises(FileNotFoundError, match=r"has no folder mmlu-pro or mmlu_pro .* holds arc_challenge, gsm8k"):
        rows_folder(tmp_path, "mmlu-pro")
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        rows_folder(tmp_path / "no", "piqa")
