"""Rows on disk → examples.

The layout is the one verl trains from. A row has `prompt` (a list of {role, content}; a last message of role
"assistant" is an open turn), `reward_model.ground_truth`, and where present `extra_info` (a mapping),
`data_source` (text) and `id` (without one, the row number is the id; a repeated one gets it added).
"""

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from es_jax.core.extras import require
from es_jax.tasks.task import Example, Message

T = TypeVar("T")
SUFFIXES = (".parquet", ".json", ".jsonl")
ROLES = ("system", "developer", "user", "assistant", "tool")


class FieldError(ValueError):
    """A field of a row is not what it should be. `checked` adds the file and the row number."""

    def __init__(self, name: str, found: object, wanted: str) -> None:
        super().__init__(f"field {name!r} is {reprlib.repr(found)}: it should be {wanted}")


def rows_folder(root: str | Path, task: str) -> Path:
    """The folder of a task's rows in a folder of folders: named like the task, or with `_` for its `-`.

    Raises:
      FileNotFoundError: there is neither.
    """
    names = dict.fromkeys((task, task.replace("-", "_")))
    found = next((Path(root) / name for name in names if (Path(root) / name).is_dir()), None)
    if found is None:
        there = _listing(Path(root)) if Path(root).is_dir() else "nothing: it does not exist"
        raise FileNotFoundError(f"{root} has no folder {' or '.join(names)} for task {task!r}; it holds {there}")
    return found


def find_split(data_dir: str | Path, split: str) -> Path:
    """The one file that holds a split: `data_dir/{split}` with the suffix .parquet, .json or .jsonl.

    Raises:
      FileNotFoundError: no such folder, or no such file in it; the message lists what is there.
      ValueError: `data_dir` is a file, or several files claim the split.
    """
    folder = Path(data_dir)
    if folder.is_file():
        raise ValueError(f"data_dir is {folder}, a file: give the folder that holds {split}.parquet")
    wanted = ", ".join(split + suffix for suffix in SUFFIXES)
    if not folder.is_dir():
        near = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path.cwd())
        raise FileNotFoundError(
            f"data_dir is {folder}, which does not exist: looked there for one of {wanted}; "
            f"the nearest folder that exists, {near}, holds {_listing(near)}"
        )
    found = [folder / (split + suffix) for suffix in SUFFIXES if (folder / (split + suffix)).is_file()]
    if not found:
        raise FileNotFoundError(
            f"data_dir is {folder}, which has no {split!r} split: looked for one of {wanted}; "
            f"it holds {_listing(folder)}"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"data_dir {folder} holds {names}: keep one file for the split {split!r}")
    return found[0]


def _listing(folder: Path, most: int = 20) -> str:
    names = sorted(path.name for path in folder.iterdir())
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest


def read_rows(path: str | Path) -> list[Mapping[str, Any]]:
    """The rows of a file, as mappings, whatever their fields are.

    Args:
      path: .parquet; .jsonl, one object a line; .json, one list of objects, or one object a line.

    Raises:
      ValueError: the file cannot be read, has no rows, or a row is not an object; named by its number,
        counting from 0.
    """
    path = Path(path)
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    if not rows:
        raise ValueError(f"{path} has no rows: it needs at least one")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}, row {number}: found {reprlib.repr(row)}, but a row is an object with fields")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    require("llm")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is damaged or is not parquet, so fetch or write it again ({reason})") from error


def _read_json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _parse_json(text, str(path))
    lines = text.rstrip().split("\n") if text.strip() else []
    return [_parse_json(line, f"{path}, row {number}") for number, line in enumerate(lines)]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {reprlib.repr(text)} is not JSON ({error})") from error


def read_examples(
    data_dir: str | Path,
    split: str,
    *,
    extra: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    needs_answer: bool = True,
) -> list[Example]:
    """Every row of a split in the verl layout, as examples, in the file's order; for their ids see `own_ids`.

    Args:
      data_dir: folder with one file for the split.
      split: the file's name without its suffix.
      extra: checks a row's `extra_info` (empty if the row has none) and returns what becomes the example's
        `meta`; raises `FieldError` for a field that is wrong.
      needs_answer: False where a row without `reward_model.ground_truth` can still be graded; its answer
        is then None.

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: the file cannot be read, or a row is wrong: names the file, the row (counting from 0), the
        field and what was found.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> row = {"prompt": [{"role": "user", "content": "2 + 2?"}], "reward_model": {"ground_truth": "4"}}
    >>> _ = (folder / "train.jsonl").write_text(json.dumps(row))
    >>> read_examples(folder, "train")
    [Example(id='0', prompt=({'role': 'user', 'content': '2 + 2?'},), answer='4', meta={})]
    """
    path = find_split(data_dir, split)
    read = partial(verl_example, extra=extra, needs_answer=needs_answer)
    return own_ids(checked(read_rows(path), str(path), read))


def checked(rows: Iterable[Mapping[str, Any]], source: str, read: Callable[[Mapping[str, Any], int], T]) -> Iterator[T]:
    """What `read` makes of every row and its number, counting from 0.

    Raises:
      ValueError: `read` raised `FieldError`; names the source and the row too.
    """
    for number, row in enumerate(rows):
        try:
            found = read(row, number)
        except FieldError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        yield found


def own_ids(examples: Iterable[Example]) -> list[Example]:
    """The examples of a split's rows; an id that is empty or was there before gets "#" and the row's number.

    >>> [example.id for example in own_ids([Example("a", "?", None), Example("a", "?", None)])]
    ['a', 'a#1']
    """
    found: dict[str, Example] = {}
    for number, example in enumerate(examples):
        while not example.id or example.id in found:
            example = replace(example, id=f"{example.id}#{number}")
        found[example.id] = example
    return list(found.values())


def verl_example(row: Mapping[str, Any], number: int, *, extra: Callable = dict, needs_answer: bool = True) -> Example:
    """One row in the verl layout as an example; arguments as in `read_examples`, `number` being the row's.

    Raises:
      FieldError: a field is not what it should be.
    """
    meta = dict(extra(_optional(row, "extra_info", Mapping, "an object") or {}))
    source = _optional(row, "data_source", str, "text")
    if source is not None:
        meta["data_source"] = source
    name = _optional(row, "id", (str, int), "text or a whole number")
    return Example(str(number if name is None else name), _prompt(row), _answer(row, needs_answer), meta)


def _optional(row: Mapping[str, Any], name: str, kind: Any, wanted: str) -> Any:
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise FieldError(name, value, f"{wanted}, or left out")
    return value


def _answer(row: Mapping[str, Any], needed: bool) -> str | None:
    model = row.get("reward_model")
    if not isinstance(model, Mapping) and (needed or model is not None):
        raise FieldError("reward_model", model, "an object with the field 'ground_truth'")
    answer = model.get("ground_truth") if model else None
    if answer is None and not needed:
        return None
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str) or not answer:
        raise FieldError("reward_model.ground_truth", answer, "text that is not empty, or a whole number")
    return answer


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = row.get("prompt")
    if not isinstance(messages, list) or not messages:
        raise FieldError("prompt", messages, "a list of at least one {role, content}")
    return tuple(_message(message, f"prompt[{at}]") for at, message in enumerate(messages))


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise FieldError(name, message, "an object {role, content}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise FieldError(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise FieldError(f"{name}.content", content, "text")
    for key, value in message.items():
        if key not in ("role", "content") and value is not None:
            raise FieldError(f"{name}.{key}", value, "left out: a message is a role and its content")
    return {"role": role, "content": content}
