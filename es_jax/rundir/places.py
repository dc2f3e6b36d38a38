"""Where the files are that a run's config names, also after the run or the working directory has moved.

config.json keeps every path as it was given; beside them "workdir", the folder that the run was in, and "places", the
whole path by the text. A reader looks for a path as it was given, then where it was beside the run, then where it was.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from es_jax.tasks.outside import is_reference

MODELS = ("model.source", "optim.anchor.source")
CODE = ("task.name", "task.grader", "evals.tasks")  # FILE.py:NAME, among other names
FIELDS = (*MODELS, *CODE, "task.data_dir", "evals.data_dir")
_STEP = re.compile(r"(?P<run>.+)@(?P<step>\d+)")


class Step(NamedTuple):
    """A step of a run, as a source of weights: RUN@STEP, or RUN for its last step (None)."""

    run: Path
    step: int | None


def is_run(path: Path) -> bool:
    """Whether a folder is a run's directory, by its config.json."""
    try:
        return "digest" in json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def as_step(source: str) -> Step | None:
    """What RUN or RUN@STEP stands for; None for the source of a model. What exists by the whole name is that. Raises
    FileNotFoundError for NAME@NUMBER where no run is.

    >>> as_step("lab")
    """
    path = Path(source).expanduser()
    if path.exists():
        return Step(path, None) if is_run(path) else None
    if (match := _STEP.fullmatch(source)) is None:
        return None
    run = Path(match["run"]).expanduser()
    if not is_run(run):
        raise FileNotFoundError(
            f"source = {source!r}: {run} is not a run's directory (from {Path.cwd()}): give RUN@STEP, such as "
            f"runs/first@{match['step']}"
        )
    return Step(run, int(match["step"]))


def run_and_step(workdir: str | Path) -> tuple[str | Path, int | None]:
    """A run's directory and the step of it that RUN@STEP names; whatever is not that as it is, and None. Raises
    FileNotFoundError as `as_step` does."""
    if Path(workdir).exists() or (step := as_step(str(workdir))) is None:
        return workdir, None
    return step


def shape_source(source: str) -> str:
    """A model of the shape of `source`: itself, or of a step of a run the base model that the run began from."""
    while source and (step := as_step(source)) is not None:
        facts = json.loads((step.run / "config.json").read_bytes())
        source = flat(locate(facts["config"], facts, step.run, needs=["model.source"]))["model.source"]
    return source


def flat(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name; a field of free options is a value."""
    return flatten_dict(dict(groups), sep=".", is_leaf=lambda path, _: path == ("task", "options"))


def locate(
    config: Mapping[str, Any], facts: Mapping[str, Any], workdir: Path, *, needs: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of a run, as nested dicts, with each path as it is found from here.

    Args:
      config: the fields as they were given.
      facts: what the run's config.json holds; {} of a run that begins.
      workdir: where the run's directory is now.
      needs: dotted names of fields whose paths must be there; others stay as they were given.

    Raises:
      FileNotFoundError: a path that is needed is in none of its places, which are named.
    """
    fields = flat(config)
    for name in FIELDS:
        value = fields.get(name)
        if isinstance(value, str):
            fields[name] = located(name, value, facts, workdir, needed=name in needs)
        elif value:
            fields[name] = [located(name, text, facts, workdir, needed=name in needs) for text in value]
    return unflatten_dict(fields, sep=".")


def located(name: str, text: str, facts: Mapping[str, Any], workdir: Path, *, needed: bool) -> str:
    """The text of one field as `locate` has it."""
    path, rest = _parts(name, text)
    if path is None or (was := facts.get("places", {}).get(path)) is None:
        return text
    given = Path(path).expanduser()
    beside = Path(os.path.normpath(Path(os.path.abspath(workdir)) / os.path.relpath(was, facts["workdir"])))
    for place in (given, beside, Path(was)):
        if place.exists() and not is_run(place):  # of a run the weights of a step were taken: they are beside
            return text if place is given else f"{place}{rest}"
    if needed:
        tried = dict.fromkeys(map(str, (given.absolute(), beside, was)))
        raise FileNotFoundError(
            f"{name} of {workdir} is {path!r} and is not there any more; looked for {', '.join(tried)}: put it back "
            "into one of these places"
        )
    return text


def _parts(name: str, text: str) -> tuple[str | None, str]:
    """The path in a field's text, None where there is none, and what comes after it."""
    if name not in CODE:
        return text, ""
    path, colon, thing = text.rpartition(":")
    return (path, colon + thing) if is_reference(text) and path.endswith(".py") else (None, "")


def record(given: Mapping[str, Any], located: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What config.json keeps of the paths in a config: "workdir" and "places". `located`: as `locate` found them."""
    pairs = zip(_paths(given), _paths(located), strict=True)
    places = {text: os.path.abspath(Path(path).expanduser()) for text, path in pairs}
    there = {text: place for text, place in places.items() if text != "lab" and os.path.exists(place)}
    return {"workdir": os.path.abspath(workdir), "places": there}


def _paths(config: Mapping[str, Any]) -> Iterator[str]:
    fields = flat(config)
    for name in FIELDS:
        value = fields.get(name)
        for text in [value] if isinstance(value, str) else value or ():
            if path := _parts(name, text)[0]:
                yield path


def whole(name: str, facts: Mapping[str, Any]) -> Any:
    """A field's value in what a config.json holds, with the whole path where it names one."""
    value = flat(facts["config"]).get(name)
    if name not in FIELDS or not isinstance(value, str):
        return value
    path, rest = _parts(name, value)
    return value if path is None else facts.get("places", {}).get(path, path) + rest


def as_given(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, as nested dicts, with the paths of another one."""
    texts = flat(given)
    return unflatten_dict(flat(config) | {name: texts[name] for name in FIELDS}, sep=".")
