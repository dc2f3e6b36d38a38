"""Reads the rows of a data set, from a folder or from the hub, as examples.

A row in verl's layout has `prompt` (a list of {role, content}; a last message with role "assistant" is an open turn)
and `reward_model.ground_truth`. It may also have `extra_info` (a mapping), `data_source` (text) and `id`; without an
id, the row number is the id. A row without `prompt` has the data set's own fields, and the task writes the prompt. "#"
and the row's number are appended to an id that is empty or repeated.
"""

import csv
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from es_jax.core.extras import require
from es_jax.tasks.task import GRADERS, Example, Message, Splits, check_count, check_known, take

Row = Mapping[str, Any]
SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
SHARD = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.parquet")  # file names in a copy of a hub data set
ROLES = ("system", "developer", "user", "assistant", "tool")


class FieldError(ValueError):
    """A field of a row is wrong. `checked` adds the source and the row number."""


def check_field(valid: object, name: str, value: object, wanted: str) -> None:
    """Raises FieldError unless the field `name` with this value is valid."""
    if not valid:
        raise FieldError(f"field {name!r} is {reprlib.repr(value)}: it should be {wanted}")


class Hub(NamedTuple):
    """A data set on the Hugging Face hub, and its splits for training and testing."""

    path: str
    config: str | None = None  # None: its only one
    train: str = "train"
    test: str = "test"  # one that has labels
    revision: str | None = None  # a branch or commit; None: the newest
    shuffle: bool = False  # shuffle the rows with a fixed seed, if neighbours are alike


# The data set; a function that makes an example from a row with its own fields; and a function of an answer and its
# field's name, which checks the answer of a row in verl's layout and returns that of the example.
Source = tuple[Hub, Callable[[Row], Example], Callable[[Any, str], str]]


@dataclass(frozen=True, kw_only=True)
class PublishedTask(Splits):
    """The fields and rows of a task with a published data set; each of the first `n` rows is checked."""

    data_dir: str | Path | None = None
    grader: str = "paper"

    def __post_init__(self) -> None:
        check_known("grader", self.grader, GRADERS)

    @property
    def source(self) -> Source:
        """Where the rows come from and how they are read."""
        raise NotImplementedError

    def _examples(self, split: str, n: int | None) -> list[Example]:
        hub, native, check_answer = self.source

        def read(row: Row, number: int) -> Example:
            if "prompt" not in row:
                return native(row)
            example = verl_example(row, number)
            return replace(example, answer=check_answer(example.answer, "reward_model.ground_truth"))

        rows, source = open_split(hub, split, self.data_dir)
        return examples_of(islice(rows, None if n is None else check_count(n)), source, read, n)


def read_examples(data_dir: str | Path, split: str, n: int | None = None) -> list[Example]:
    """The first `n` rows of a folder's split in the verl layout, as examples; None takes all. Every row is checked."""
    rows, source = read_split(data_dir, split)
    return examples_of(rows, source, verl_example, n)


def checked(rows: Iterable[Any], source: str, read: Callable[[Any, int], Any]) -> Iterator[Any]:
    """The results of `read` for every row and its number, from 0; a FieldError gets the source and the number."""
    for number, row in enumerate(rows):
        try:
            result = read(row, number)
        except FieldError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        yield result


def examples_of(rows: Iterable[Any], source: str, read: Callable[[Any, int], Example], n: int | None) -> list[Example]:
    """The first `n` of the `checked` examples, with unique ids."""
    examples: dict[str, Example] = {}
    for number, example in enumerate(checked(rows, source, read)):
        while not example.id or example.id in examples:  # ProofWriter's ids belong to theories, so many rows share one
            example = replace(example, id=f"{example.id}#{number}")
        examples[example.id] = example
    return take(list(examples.values()), n, source=source)


def open_split(hub: Hub, split: str, data_dir: str | Path | None) -> tuple[Iterable[Row], str]:
    """The rows of a split, and the name of their source: `data_dir`, or the hub if it is None.

    The file in a folder has the split's name, the hub's name for it, or "validation"; training never takes the test's
    file. Raises FileNotFoundError without such a file, OSError if the hub cannot be reached.
    """
    if data_dir is None:
        name = getattr(hub, split, split)
        return hub_rows(hub, name), f"{hub.path}, split {name}"
    stem = _file_stem(data_dir, split, hub)
    files = find_split(data_dir, stem)
    if split == "train" and stem == _file_stem(data_dir, "test", hub):
        names = " and ".join(path.name for path in files)
        raise FileNotFoundError(f"data_dir is {data_dir}, where {names} is the test split: add a train split")
    return read_split(data_dir, stem)


def _file_stem(data_dir: str | Path, split: str, hub: Hub) -> str:
    stems = (split, getattr(hub, split, split), "validation")
    return next((stem for stem in stems if any(candidates(Path(data_dir), stem))), split)


def hub_rows(hub: Hub, split: str | None) -> Any:
    """The rows of a split of a hub data set; without a split, the rows of each split by name."""
    require("llm")
    import datasets

    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except Exception as error:  # the library passes on errors of its transport
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if re.search("Unknown split|Config name is missing|BuilderConfig", str(error)):  # it exists, but without this
            raise ValueError(
                f"{hub.path} has no rows for config {hub.config!r}, split {split!r}: choose others ({reason})"
            ) from error
        raise OSError(
            f"the rows of {hub.path} (split {split}) cannot be fetched from the Hugging Face hub ({reason}): load "
            "them once with a network connection, which keeps them in the cache of `datasets`, or put them into a "
            "folder as parquet or json and set data_dir to it"
        ) from error
    return rows.shuffle(seed=0) if hub.shuffle else rows


def rows_folder(root: str | Path, task: str) -> Path:
    """The folder with a task's rows in `root`: named like the task, or with `_` for `-`."""
    root, names = Path(root), dict.fromkeys((task, task.replace("-", "_")))
    for name in names:
        if (root / name).is_dir():
            return root / name
    content = _listing(root) if root.is_dir() else "nothing: it does not exist"
    raise FileNotFoundError(
        f"{root} has no folder {' or '.join(names)} for task {task!r}: add it; {root} holds {content}"
    )


def find_split(data_dir: str | Path, split: str) -> list[Path]:
    """The file of a split, `data_dir/{split}` with one of SUFFIXES; or in a copy of a hub data set its files,
    `{split}-00000-of-00002.parquet`, … in the folder or in its folder `data`."""
    folder, names = Path(data_dir), [split + suffix for suffix in SUFFIXES]
    if folder.is_file():
        raise ValueError(f"data_dir is {folder}, which is a file: give the folder that holds {split}.parquet")
    if not folder.is_dir():
        near = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path.cwd())
        raise FileNotFoundError(
            f"data_dir is {folder}, which does not exist: looked there for one of {', '.join(names)}; "
            f"the nearest folder that exists, {near}, holds {_listing(near)}"
        )
    found = [*candidates(folder, split)]
    if not found:
        raise FileNotFoundError(
            f"data_dir is {folder}, which has no {split!r} split: looked for one of {', '.join(names)}; "
            f"it holds {_listing(folder)}"
        )
    if len(found) > 1:
        first = " and ".join(files[0].name for files in found)
        raise ValueError(f"data_dir {folder} holds {first}: keep one file for the split {split!r}")
    (files,) = found
    if (match := SHARD.search(files[0].name)) and len(files) != int(match[2]):
        raise ValueError(
            f"{files[0].parent} holds only {len(files)} of {int(match[2])} files of the split {split!r}: fetch all"
        )
    return files


def candidates(folder: Path, split: str) -> Iterator[list[Path]]:
    """The files of a split, in every form that the folder has."""
    yield from ([folder / (split + suffix)] for suffix in SUFFIXES if (folder / (split + suffix)).is_file())
    for place in (folder, folder / "data"):
        shards = sorted(place.glob(f"{split}-*.parquet"))
        if shards := [path for path in shards if SHARD.fullmatch(path.name.removeprefix(split))]:
            yield shards


def read_split(data_dir: str | Path, split: str) -> tuple[list[Row], str]:
    """The rows of a folder's split, and the name of their source. Raises as `find_split` and `read_rows`."""
    files = find_split(data_dir, split)
    return [row for path in files for row in read_rows(path)], str(files[0] if len(files) == 1 else files[0].parent)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) or "nothing") + rest


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file as mappings: .parquet; .jsonl with one object per line; .json with a list of objects, or like
    .jsonl; .csv with the columns' names in the first line, where every value is text."""
    path = Path(path)
    rows = {".parquet": _read_parquet, ".csv": _read_csv}.get(path.suffix, _read_json)(path)
    if not rows:
        raise ValueError(f"{path} has no rows: it needs at least one")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}, row {number} is {reprlib.repr(row)}: it must be an object with fields")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    require("llm")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # also for text that is not UTF-8
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is damaged or not parquet: fetch or write it again ({reason})") from error


def _read_csv(path: Path) -> list[Any]:
    lines = csv.reader(io.StringIO(_text(path, newline="").removeprefix("\ufeff"), newline=""), strict=True)
    try:
        names, *rows = (line for line in lines if line)
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"{path}, line {lines.line_num} is not CSV: write the file as CSV with names in the first line ({error})"
        ) from error
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has two columns with the same name in its first line, {', '.join(names)}: rename one")
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"{path}, row {number} has {len(row)} fields, but there are {len(names)} columns: correct the row"
            )
    return [dict(zip(names, row, strict=True)) for row in rows]


def _text(path: Path, newline: str | None = None) -> str:
    try:
        with open(path, encoding="utf-8", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def _read_json(path: Path) -> list[Any]:
    text = _text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _parse_json(text, str(path))
    lines = text.rstrip().split("\n") if text.strip() else []
    return [_parse_json(line, f"{path}, row {number}") for number, line in enumerate(lines)]


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {reprlib.repr(text)} is not JSON, so correct it ({error})") from error


def verl_example(row: Row, number: int, *, extra: Callable[[Row], Row] = dict, needs_answer: bool = True) -> Example:
    """A row in the verl layout as an example.

    `extra` checks its `extra_info` (empty if absent) and returns the example's `meta`. Without `needs_answer` the row
    may lack `reward_model.ground_truth`; the answer is then None.
    """
    meta = dict(extra(_optional(row, "extra_info", Mapping, "an object") or {}))
    if (source := _optional(row, "data_source", str, "text")) is not None:
        meta["data_source"] = source
    name = _optional(row, "id", (str, int), "text or a whole number")
    messages: Any = row.get("prompt")
    check_field(isinstance(messages, list) and messages, "prompt", messages, "a list of at least one {role, content}")
    return Example(str(number if name is None else name), _messages(messages), _answer(row, needs_answer), meta)


def own_example(prompt: Any, answer: Any, id: Any, meta: Mapping[str, Any]) -> Example:
    """An example from a prompt (text or messages), an answer (text, a number or None) and an id. Raises FieldError."""
    if isinstance(prompt, list | tuple) and prompt:
        prompt = _messages(prompt)
    else:
        check_field(
            isinstance(prompt, str) and prompt, "prompt", prompt, "text that is not empty, or a list of messages"
        )
    check_field(isinstance(answer, str | int | float | None), "answer", answer, "text or a number, or left out")
    check_field(isinstance(id, str | int), "id", id, "text or a whole number, or left out")
    return Example(str(id), prompt, None if answer is None else str(answer), dict(meta))


def _messages(messages: Any) -> tuple[Message, ...]:
    return tuple(_message(message, f"prompt[{at}]") for at, message in enumerate(messages))


def _optional(row: Row, name: str, kind: Any, wanted: str) -> Any:
    value = row.get(name)
    valid = value is None or (isinstance(value, kind) and not isinstance(value, bool))
    check_field(valid, name, value, f"{wanted}, or left out")
    return value


def _answer(row: Row, needed: bool) -> str | None:
    model = row.get("reward_model")
    valid = isinstance(model, Mapping) or (model is None and not needed)
    check_field(valid, "reward_model", model, "an object with the field 'ground_truth'")
    answer = model.get("ground_truth") if model else None
    if answer is None and not needed:
        return None
    valid = isinstance(answer, str | int) and not isinstance(answer, bool) and answer != ""
    check_field(valid, "reward_model.ground_truth", answer, "text that is not empty, or a whole number")
    return str(answer)


def _message(message: Any, name: str) -> Message:
    check_field(isinstance(message, Mapping), name, message, "an object {role, content}")
    role, content = message.get("role"), message.get("content")
    check_field(role in ROLES, f"{name}.role", role, f"one of {', '.join(ROLES)}")
    check_field(isinstance(content, str), f"{name}.content", content, "text")
    for key, value in message.items():
        valid = key in ("role", "content") or value is None
        check_field(valid, f"{name}.{key}", value, "left out, since a message has only a role and its content")
    return {"role": role, "content": content}


def text_field(row: Row, name: str) -> str:
    """The text in a field, without white space around it.

    >>> text_field({"question": " 2 + 2? "}, "question")
    '2 + 2?'
    """
    value: Any = row.get(name)
    check_field(isinstance(value, str) and value.strip(), name, value, "text that is not empty")
    return value.strip()


def texts_field(row: Row, name: str, *, least: int, most: int) -> tuple[str, ...]:
    """The `least` to `most` texts in a field, without white space around them."""
    texts: Any = row.get(name)
    valid = isinstance(texts, list) and least <= len(texts) <= most
    valid = valid and all(isinstance(text, str) and text.strip() for text in texts)
    check_field(valid, name, texts, f"a list of {least} to {most} texts")
    return tuple(text.strip() for text in texts)
