"""A grid of runs: a point for every combination of the values of some fields, and how far each has come.

A point's run is in a folder that is named after those fields and their values, so a point keeps its folder when values
are added to the grid.
"""

import copy
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from os.path import abspath
from pathlib import Path
from typing import Any, get_origin

from flax.traverse_util import flatten_dict
from ml_collections import config_dict

from es_jax.core.names import SHORT
from es_jax.rundir import directory
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import steps_done
from es_jax.tasks import check_name
from es_jax.tasks.outside import label
from es_jax.training.config import FIELDS, RunConfig, freeze, read_config

OPEN, CLOSE = "([{", ")]}"
DONE, NOT_BEGUN = "done", "not begun"
_SHORT = {field: name for name, field in SHORT.items()}
_LONGEST = 200  # letters of a folder's name; file systems allow 255 bytes


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a grid.

    Attributes:
      name: what its folder is called: "seed=0,kappa=0.5".
      values: the fields of the grid by full name.
      config: all fields, checked.
      folder: its run's directory.
    """

    name: str
    values: Mapping[str, Any]
    config: RunConfig
    folder: Path


def split(text: str) -> list[str]:
    """The values of a list with commas; those in brackets or in quotes belong to a value.

    Raises:
      ValueError: a bracket or a quote is not closed.

    >>> split("0.5, 1"), split("(3,5),(4,6)"), split('{"a": [1, 2]},"x, y"')
    (['0.5', '1'], ['(3,5)', '(4,6)'], ['{"a": [1, 2]}', '"x, y"'])
    """
    values, closing, quote = [""], "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (closing or not values[-1].strip()):  # an apostrophe in a word is none
            quote = letter
        elif letter in OPEN:
            closing += CLOSE[OPEN.index(letter)]
        elif letter == closing[-1:]:
            closing = closing[:-1]
        elif letter == "," and not closing:
            values.append("")
            continue
        values[-1] += letter
    if quote or closing:
        raise ValueError(f"{text!r}: {quote or closing[-1]} is missing; close the quote or bracket")
    return [value.strip() for value in values]


def read_axis(text: str) -> tuple[str, list[Any]]:
    """A field's full name and its values, of "train.seed=0,1,2". A value of a field that holds a tuple is in brackets.

    Raises:
      ValueError: there is no such field; or a value is missing, of another type, or there twice.

    >>> read_axis("optim.anchor.kappa=0.5,None"), read_axis("train.profile=(1,3),()")
    (('optim.anchor.kappa', [0.5, None]), ('train.profile', [(1, 3), ()]))
    """
    name, equals, listed = (part.strip() for part in text.partition("="))
    if not equals:
        raise ValueError(f"{text!r} is not FIELD=VALUE,VALUE,…: write it as in train.seed=0,1,2")
    if name not in FIELDS and not FIELDS.of_option(name):
        raise ValueError(FIELDS.unknown(name))
    values: list[Any] = []
    for value in split(listed):
        if not value:
            raise ValueError(f"{text!r} has an empty value: remove a comma, or write '' for an empty text")
        if get_origin(FIELDS.get(name)) is tuple and value[0] not in OPEN and value != "None":
            raise ValueError(f"{name} is {value!r}: it holds a tuple, so put each value in brackets, as in ({value})")
        quotes = "'\"" if name in FIELDS else "'"  # the others are JSON's, of an option
        quoted = value[0] in quotes and value[0] == value[-1]
        value = value[1:-1] if quoted else value
        parsed = value if quoted and name not in FIELDS else FIELDS.parse(name, value)
        if any(parsed == other and type(parsed) is type(other) for other in values):
            raise ValueError(f"{name} has {value} twice: give each value once")
        values.append(parsed)
    return name, values


def make_points(config: config_dict.ConfigDict | dict, axes: Sequence[str], out: str | Path) -> list[Point]:
    """The points of a grid, the last field's values first. All are checked: nothing is written or begun.

    Args:
      config: what all have in common: the ConfigDict of a config file, or nested dicts.
      axes: texts for `read_axis`, a field each.
      out: the folder for the folders of the runs.

    Raises:
      ValueError: no axis is given, one is wrong, a field is given twice, or a point's config is refused; it is named.

    >>> [point.name for point in make_points({}, ["train.seed=0,1", "es.sigma=1e-3,0.01"], "runs/sweep")]
    ['seed=0,sigma=0.001', 'seed=0,sigma=0.01', 'seed=1,sigma=0.001', 'seed=1,sigma=0.01']
    """
    if not axes:
        raise ValueError("no field is to vary: give --over FIELD=VALUE,VALUE,…, as in --over train.seed=0,1,2")
    read = [read_axis(axis) for axis in axes]
    names = [name for name, _ in read]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is given twice: give all its values at once, with commas")
    fields = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    points: list[Point] = []
    for combination in itertools.product(*(values for _, values in read)):
        values = dict(zip(names, combination, strict=True))
        name = _folder_name(values)
        if any(point.name == name for point in points):
            raise ValueError(f"two points would have the folder {name!r}: give these values in sweeps of their own")
        try:
            point = freeze(_with(fields, values))
            check_name(point.task.name)
        except ValueError as error:
            raise ValueError(f"point {len(points)} ({name}): {error}") from None
        points.append(Point(name, values, point, Path(out) / name))
    return points


def _with(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with some values by full name."""
    whole: dict[str, Any] = copy.deepcopy(dict(fields))
    for name, value in values.items():
        group, (*groups, last) = whole, name.split(".")
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = value
    return whole


def _folder_name(values: Mapping[str, Any]) -> str:
    """The fields, by short names where they have some, with their values; what a folder cannot be called is replaced,
    and a sum added."""
    parts = []
    for field, value in values.items():
        text = "+".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
        text = text.removesuffix(".0") if isinstance(value, float) else text
        parts.append(f"{_SHORT.get(field, field)}={_safe(text)}")
    name = ",".join(parts)
    return name if len(name.encode()) <= _LONGEST else f"{name[: _LONGEST // 4]}-{_digest(name)}"


def _safe(text: str) -> str:
    safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    return safe if safe == text else f"{safe.strip('-')}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def state(point: Point) -> str:
    """`NOT_BEGUN`, "step 3 of 300" or `DONE`; or "holds …" where the folder has a run of another config."""
    step, steps = steps_done(point.folder), point.config.train.steps
    if not step:
        return NOT_BEGUN
    there, here = (
        flatten_dict(dataclasses.asdict(config), sep=".") for config in (read_config(point.folder), point.config)
    )
    free = [*directory.CHANGEABLE, *directory.SIZES]  # a run judges whether its sizes may change
    if here[directory.DATE] is None:  # a run chooses it then
        free.append(directory.DATE)
    differing = [
        f"{name} was {there.get(name)!r} and is {here.get(name)!r}"
        for name in here | there
        if not name.startswith(tuple(free)) and not _same(there.get(name), here.get(name))
    ]
    if differing:
        return f"holds a run of another config: {'; '.join(differing)}"
    return DONE if step == steps and (point.folder / "DONE").exists() else f"step {step} of {steps}"


def _same(one: Any, other: Any) -> bool:
    """Whether values are equal, or are one path."""
    return one == other or (all(isinstance(x, str) for x in (one, other)) and abspath(one) == abspath(other))


def check_folders(points: Sequence[Point]) -> None:
    """Raises ValueError where a point's folder has a run of another config."""
    for point in points:
        if (now := state(point)).startswith("holds"):
            raise ValueError(f"{point.folder} {now}. Choose another --out, or set the fields back")


def row(point: Point, error: str | None = None) -> dict[str, Any]:
    """What a point reached: its fields by full name, then state, step, reward, accuracy, accuracy_se, drift and error;
    None where it is not known. `error`: why it failed."""
    metrics = read_jsonl(point.folder / "metrics.jsonl")
    heldout = read_jsonl(point.folder / "evals" / f"{label(point.config.task.name)}.jsonl")
    last, test = metrics[-1] if metrics else {}, heldout[-1] if heldout else {}
    return {
        "point": point.name,
        **point.values,
        "state": "failed" if error else state(point),
        "step": steps_done(point.folder),
        "reward": last.get("reward_mean"),
        "accuracy": test.get("accuracy"),
        "accuracy_se": test.get("accuracy_se"),
        "drift": last.get("drift"),
        "error": error,
    }
