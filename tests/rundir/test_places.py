"""Where a reader finds the files that a run's config names."""

import json
import os
from pathlib import Path

import pytest

from es_jax.evals.runner import run_and_steps
from es_jax.rundir.places import FIELDS, as_given, as_step, flat, locate, record, run_and_step, shape_source, whole

CONFIG = {
    "model": {"source": "models/base"},
    "task": {"name": "tasks/mine.py:Mine", "data_dir": "rows", "grader": "exact", "options": {"a": {"b": 1}}},
    "optim": {"anchor": {"source": None}},
    "evals": {"tasks": ["lab-add", "tasks/other.py:Other"], "data_dir": None},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with what CONFIG names, and the run `runs/one` in it; its facts as config.json has them."""
    folder = tmp_path / "project"
    for path in (
        "models/base/config.json",
        "tasks/mine.py",
        "tasks/other.py",
        "rows/train.jsonl",
        "runs/one/config.json",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    monkeypatch.chdir(folder)
    return folder, {"config": CONFIG, **record(CONFIG, CONFIG, Path("runs/one"))}


def test_what_is_there_is_written_down(project):
    folder, facts = project
    names = {"models/base", "tasks/mine.py", "rows", "tasks/other.py"}
    assert facts["places"] == {name: str(folder / name) for name in names} and facts["workdir"] == f"{folder}/runs/one"
    assert locate(CONFIG, facts, Path("runs/one"), needs=FIELDS) == CONFIG  # as it was given, from the same folder


@pytest.mark.parametrize(
    ("moved", "workdir", "found"),
    [  # from another working directory: the run where it was; all moved together; the run alone
        ("project", "project/runs/one", "project"),
        ("elsewhere", "elsewhere/runs/one", "elsewhere"),
        ("project", "alone", "project"),
    ],
)
def test_a_path_is_found_beside_the_run_or_where_it_was(moved, workdir, found, project, tmp_path, monkeypatch):
    folder, facts = project
    monkeypatch.chdir(tmp_path)
    os.rename(folder, tmp_path / moved) if moved != "project" else None
    there = flat(locate(CONFIG, facts, tmp_path / workdir, needs=FIELDS))
    root = tmp_path / found
    assert there["model.source"] == f"{root}/models/base" and there["task.data_dir"] == f"{root}/rows"
    assert there["task.name"] == f"{root}/tasks/mine.py:Mine" and there["task.grader"] == "exact"
    assert there["evals.tasks"] == ["lab-add", f"{root}/tasks/other.py:Other"]
    assert as_given(locate(CONFIG, facts, tmp_path / workdir), CONFIG) == CONFIG


def test_a_path_from_here_wins(project, tmp_path, monkeypatch):
    _, facts = project
    (tmp_path / "here/models/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert locate(CONFIG, facts, tmp_path / "project/runs/one")["model"]["source"] == "models/base"


@pytest.mark.parametrize("field", ["model.source", "task.data_dir", "task.name", "evals.tasks"])
def test_what_is_nowhere_is_named_with_its_places_where_it_is_needed(field, project, tmp_path, monkeypatch):
    folder, facts = project
    monkeypatch.chdir(tmp_path)
    os.rename(folder, tmp_path / "gone")
    value = flat(CONFIG)[field]
    assert flat(locate(CONFIG, facts, tmp_path / "new/runs/one"))[field] == value
    with pytest.raises(FileNotFoundError) as error:
        locate(CONFIG, facts, tmp_path / "new/runs/one", needs=[field])
    path = (value[1] if isinstance(value, list) else value).partition(":")[0]
    assert all(str(root / path) in str(error.value) for root in (tmp_path, tmp_path / "new", folder))
    assert str(error.value).startswith(f"{field} of {tmp_path}/new/runs/one is {path!r}")


def test_what_no_path_was_stays_as_it_is(project, tmp_path):
    """A name of the hub, the laboratory's model, and fields of runs of earlier versions."""
    for source in ("owner/name", "lab"):
        config = CONFIG | {"model": {"source": source}}
        facts = {"config": config, **record(config, config, tmp_path / "run")}
        assert (
            source not in facts["places"] and locate(config, facts, tmp_path, needs=FIELDS)["model"]["source"] == source
        )
    assert locate(CONFIG, {"config": CONFIG}, tmp_path, needs=FIELDS) == CONFIG


def test_a_path_said_in_two_ways_is_one(project, monkeypatch):
    folder, facts = project
    monkeypatch.chdir("runs")
    other = CONFIG | {"task": CONFIG["task"] | {"name": "../tasks/mine.py:Mine"}}
    again = {"config": other, **record(other, other, Path("one"))}
    assert whole("task.name", facts) == whole("task.name", again) == f"{folder}/tasks/mine.py:Mine"
    assert whole("task.grader", facts) == "exact"


def test_steps_of_runs_are_sources(project, tmp_path):
    run = Path("runs/one")
    (run / "config.json").write_text(json.dumps({"digest": "0", "config": CONFIG}))
    assert as_step("runs/one@12") == (run, 12) and as_step("runs/one") == (run, None)
    assert as_step("models/base") is None and as_step("owner/name") is None
    Path("models/base@3").mkdir()
    assert as_step("models/base@3") is None  # a folder of that name
    with pytest.raises(FileNotFoundError, match=r"'runs/two@3': runs/two is not a run's directory"):
        as_step("runs/two@3")
    assert shape_source("runs/one@12") == "models/base" == shape_source("models/base") and shape_source("") == ""


def test_run_and_step(project, monkeypatch):
    """Also of a run in the home folder, which the shell does not write out in quotes."""
    folder, _ = project
    (folder / "runs/one/config.json").write_text('{"digest": "1"}')
    monkeypatch.setenv("HOME", str(folder))
    assert run_and_step("runs/one@3") == (Path("runs/one"), 3)
    assert [run_and_step(name) for name in ("runs/one", "models/base", "lab")] == [
        ("runs/one", None), ("models/base", None), ("lab", None)
    ]  # fmt: skip
    assert run_and_step("~/runs/one") == (folder / "runs/one", None)
    assert run_and_step("~/runs/one@0") == (folder / "runs/one", 0)
    assert run_and_steps("~/runs/one", None, None) == (folder / "runs/one", None)  # not step 0 alone
    assert run_and_steps("runs/one@3", None, None) == (Path("runs/one"), [3])
    assert run_and_steps("runs/one@3", "lab", [1]) == ("runs/one@3", [1])
