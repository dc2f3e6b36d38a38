"""The rows of a published data set, from a folder or from the hub, as examples.

A row is either in the verl layout (it has `prompt`, see `es_jax.tasks.data`) and brings its own prompt, or it has the
data set's own fields and the task writes the prompt.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from es_jax.core.extras import require
from es_jax.tasks.data import SUFFIXES, FieldError, checked, find_split, own_ids, read_rows, verl_example
from es_jax.tasks.task import Example, check_count, check_grader, take

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub.

    Args:
      path: its name there.
      config: which of its configurations; None is its only one.
      train: its split for training.
      test: its split for testing: one that has labels.
      revision: a branch or commit; None is the newest.
      shuffle: mix the rows with a fixed seed, where neighbours are alike.
    """

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "test"
    revision: str | None = None
    shuffle: bool = False


def load_examples(
    hub: Hub,
    split: str,
    n: int | None,
    *,
    data_dir: str | Path | None,
    native: Callable[[Row], Example],
    verl: Callable[[Example], Example],
) -> list[Example]:
    """The first `n` examples of a split, every one of them checked.

    Args:
      hub: where the rows are if `data_dir` is None.
      split: "train" or "test".
      n: how many; None is all.
      data_dir: a folder with a file for the split, under that name, under the hub's name for it, or "validation".
      native: makes an example of a row with the data set's own fields. An empty or repeated id gets the row's number.
      verl: checks the example of a row in the verl layout, and may add to it.

    Raises:
      FileNotFoundError: the folder has no such split, or only one that the test split uses already.
      OSError: the hub cannot be reached; says how to do without.
      ValueError: `n` < 1 or more than there is; or a bad row, named by file, row (counting from 0) and field.
    """
    if data_dir is None:
        name = getattr(hub, split)
        rows, source = hub_rows(hub, name), f"{hub.path}, split {name}"
    else:
        path = split_file(data_dir, split, hub)
        rows, source = read_rows(path), str(path)
    wanted = itertools.islice(rows, None if n is None else check_count(n))
    return take(_examples(wanted, source, native, verl), n, source=source)


def _examples(rows: Iterable[Row], source: str, native: Callable, verl: Callable) -> list[Example]:
    def read(row: Row, number: int) -> Example:
        return verl(verl_example(row, number)) if "prompt" in row else native(row)

    return own_ids(checked(rows, source, read))  # ProofWriter's ids are those of theories, so many rows share one


def split_file(data_dir: str | Path, split: str, hub: Hub) -> Path:
    """The file of a split in a folder; training never gets the file that the test takes.

    Raises:
      FileNotFoundError: there is none; the message lists what is there.
      ValueError: `data_dir` is a file, or several files claim the split.
    """
    name = _name(data_dir, split, hub)
    path = find_split(data_dir, name)
    if split == "train" and name == _name(data_dir, "test", hub):
        raise FileNotFoundError(f"data_dir is {data_dir}, where {path.name} is the test split: add a train split")
    return path


def _name(data_dir: str | Path, split: str, hub: Hub) -> str:
    names = dict.fromkeys((split, getattr(hub, split), "validation"))
    return next((x for x in names if any((Path(data_dir) / (x + end)).is_file() for end in SUFFIXES)), split)


def hub_rows(hub: Hub, split: str) -> Iterable[Row]:
    """The rows of a split on the hub, or of its copy in the cache of `datasets`.

    Raises:
      OSError: they cannot be had: no network, HF_HUB_OFFLINE, or no such data set.
    """
    require("llm")
    import datasets

    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except Exception as error:  # the library raises whatever its transport raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"the rows of {hub.path} (split {split}) cannot be had from the Hugging Face hub ({reason}): load them "
            "once with a network, which keeps them in the cache of `datasets`, or put them into a folder as parquet or "
            "json and give the folder as data_dir"
        ) from error
    return rows.shuffle(seed=0) if hub.shuffle else rows


def text_field(row: Row, name: str) -> str:
    """A field that holds text, without the white space around it.

    Raises:
      FieldError: it is absent, empty or not text.

    >>> text_field({"question": " 2 + 2? "}, "question")
    '2 + 2?'
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise FieldError(name, value, "text that is not empty")
    return value.strip()


def texts_field(row: Row, name: str, found: object, *, least: int, most: int) -> tuple[str, ...]:
    """A list of texts, each not empty.

    Raises:
      FieldError: it is not such a list, or has fewer than `least` or more than `most` texts.
    """
    good = isinstance(found, list) and least <= len(found) <= most
    if not isinstance(found, list) or not good or not all(isinstance(x, str) and x.strip() for x in found):
        raise FieldError(name, found, f"a list of {least} to {most} texts")
    return tuple(text.strip() for text in found)


@dataclass(frozen=True)
class Published:
    """The fields and rows of a task with a published data set. `source`: hub, native, verl of `load_examples`."""

    data_dir: str | Path | None = None
    grader: str = "paper"

    source: ClassVar[tuple[Hub, Callable[[Row], Example], Callable[[Example], Example]]]

    def __post_init__(self) -> None:
        check_grader(self.grader)

    def train(self, n: int | None = None) -> list[Example]:
        """The first `n` training examples; raises ValueError or OSError as `load_examples`."""
        return self._examples("train", n)

    def test(self, n: int | None = None) -> list[Example]:
        """The first `n` test examples; raises like `train`."""
        return self._examples("test", n)

    def _examples(self, split: str, n: int | None) -> list[Example]:
        hub, native, verl = self.source
        return load_examples(hub, split, n, data_dir=self.data_dir, native=native, verl=verl)
