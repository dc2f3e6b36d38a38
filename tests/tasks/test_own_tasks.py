"""Tasks from outside the package: how they are named, made, and what is said of mistakes."""

import dataclasses
import importlib.metadata
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_jax.tasks import (
    TASKS,
    Example,
    Score,
    SimpleTask,
    check_name,
    get_task,
    name_and_options,
    options_of,
    source_digest,
)
from es_jax.tasks.outside import GROUP, label
from es_jax.tasks.task import as_score

SOURCE = """
from beside import letters
from es_jax import SimpleTask

class Mirror(SimpleTask):
    def __init__(self, size: int = 3):
        self.size = size

    def rows(self, split):
        return [{"prompt": word, "answer": word[::-1], "length": len(word)} for word in letters(self.size)]

    def score(self, example, completion):
        return completion == example.answer

def short(size=2):
    return Mirror(size)

class Outer:
    class Inner(Mirror):
        pass

ready = Mirror(1)
number = 3
"""


@dataclasses.dataclass(frozen=True)
class Sized(SimpleTask):
    size: int = 3
    folder: Path | None = None

    def rows(self, split: str) -> list[tuple[str, int]]:
        return [(f"{i} + {i} =", 2 * i) for i in range(self.size)]

    def score(self, example: Example, completion: str) -> float:
        return float(completion == example.answer)


class Plain(SimpleTask):
    name = "plain"


class Tuned(Plain):
    def __init__(self, weight: float):
        self.weight = weight


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task file that uses its neighbour; the working directory is the one above."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mirror.py").write_text(SOURCE)
    (tmp_path / "own/beside.py").write_text("def letters(n): return ['abcdefgh'[i:i + 2] for i in range(n)]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "own"
    sys.modules.pop("beside", None)


@pytest.mark.parametrize("place", ["own/mirror.py", "{folder}/mirror.py", "own.mirror"])
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("Mirror", {"size": 2}, 2), ("short", {}, 2), ("ready", {}, 1), ("Outer.Inner", {}, 3)],
)
def test_a_file_and_a_module_name_classes_functions_and_objects(
    folder: Path, place: str, name: str, options: dict, count: int
) -> None:
    sys.path.append(str(folder))  # as when it is installed: a module's neighbours are not looked for
    task = get_task(f"{place.format(folder=folder)}:{name}", **options)
    examples = task.train()
    assert [e.prompt for e in examples] == ["ab", "bc", "cd"][:count] and examples[0].meta == {"length": 2}
    assert as_score(task.score(examples[0], "ba")) == Score(1.0, {"answer": 1.0})
    for one in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[one]


def test_a_file_that_changed_is_loaded_again_and_its_neighbours_count_in_its_sum(folder: Path) -> None:
    name = "own/mirror.py:Mirror"
    first, again = get_task(name), get_task(name)
    assert type(first) is type(again)
    sums = [source_digest(first)]
    (folder / "mirror.py").write_text(SOURCE.replace("[::-1]", ""))
    changed = get_task(name)
    assert changed.train(1)[0].answer == "ab" and first.train(1)[0].answer == "ba"
    sums += [source_digest(changed)]
    (folder / "beside.py").write_text("def letters(n): return ['x'] * n\n")
    sums += [source_digest(changed)]
    assert len(set(sums)) == 3 and source_digest(first) == source_digest(again)
    assert source_digest(get_task("countdown")) is None and source_digest(get_task("lab-add")) is None
    assert not (folder / "__pycache__/mirror.cpython-311.pyc").exists()
    assert type(pickle.loads(pickle.dumps(first))) is type(first)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        (
            "own/miror.py:Mirror",
            FileNotFoundError,
            r"'own/miror\.py:Mirror' cannot be loaded, since /.*miror\.py does not exist: give",
        ),
        (
            "own/mirror.py:Miror",
            ValueError,
            r"own/mirror\.py has no 'Miror': choose a name that it defines, Mirror, short, Outer, ready",
        ),
        (
            "own/mirror.py:number",
            ValueError,
            "is 3, which has no train and no test and no score: it must be a task, such as",
        ),
        ("own/mirror.py:Outer", ValueError, "has no train and no test and no score"),
        ("own/broken.py:Task", ValueError, r"own/broken\.py raised ZeroDivisionError: division by zero"),
        ("own/syntax.py:Task", ValueError, r"own/syntax\.py raised SyntaxError"),
        ("no_such_package.module:Task", ValueError, "no_such_package.module raised ModuleNotFoundError"),
        ("own/mirror.py", ValueError, r"unknown task 'own/mirror\.py'.*FILE\.py:NAME or package\.module:NAME"),
        ("mirror.Mirror", ValueError, r"unknown task 'mirror\.Mirror'.*own task as FILE\.py:NAME"),
        ("own/mirror.py:", ValueError, "unknown task 'own/mirror.py:'"),
        ("countdwn", ValueError, "did you mean 'countdown'"),
        (
            "own/mirror.py:Mirror",
            ValueError,
            "unknown option of task 'own/mirror.py:Mirror' 'sise': did you mean 'size'",
        ),
        ("own/mirror.py:ready", ValueError, "unknown option of task 'own/mirror.py:ready' 'sise'"),
    ],
)
def test_a_name_that_is_none_is_told(folder: Path, name: str, error: type, says: str) -> None:
    (folder / "broken.py").write_text("1 / 0")
    (folder / "syntax.py").write_text("class Task(")
    with pytest.raises(error, match=says):
        get_task(name, **({"sise": 1} if "sise" in says else {}))


def test_what_a_constructor_raises_is_told_with_its_options(folder: Path) -> None:
    (folder / "picky.py").write_text("def task(size): raise KeyError(size)\ndef free(**options): return options\n")
    with pytest.raises(ValueError, match=r"task 'own/picky\.py:task' with size=4 raised KeyError: 4"):
        get_task("own/picky.py:task", size=4)
    with pytest.raises(ValueError, match=r"with no options raised TypeError: task\(\) missing 1 required"):
        get_task("own/picky.py:task")
    assert options_of("own/picky.py:free") is None and options_of("own/picky.py:task") == ["size"]


def test_packages_register_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("mirrored", "own.mirror:Mirror", GROUP),
        importlib.metadata.EntryPoint("gone", "no_such_package:Task", GROUP),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == GROUP else [])
    sys.path += [str(folder), str(folder.parent)]
    assert len(get_task("mirrored", size=2).train()) == 2 and label("mirrored") == "mirrored"
    check_name("mirrored")
    with pytest.raises(ValueError, match="task 'gone': its entry point raised ModuleNotFoundError"):
        get_task("gone")
    with pytest.raises(ValueError, match=r"unknown task 'miror'.*mirrored"):
        get_task("miror")
    for one in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[one]


@pytest.mark.parametrize(
    ("task", "name", "options"),
    [
        (Sized(), "{here}:Sized", {}),
        (Sized(size=5, folder=Path("x")), "{here}:Sized", {"size": 5, "folder": "x"}),
        (Plain(), "{here}:Plain", {}),
        (Tuned(0.5), "plain", {}),  # what made it is not known
        (TASKS["countdown"](grader="strict"), "countdown", {"grader": "strict"}),
        (TASKS["piqa"](continuation="text"), "piqa", {"continuation": "text"}),
        (TASKS["lab-add"](seed=3), "lab-add", {"seed": 3}),
        (get_task("rows", hub="a/b", prompt="{q}", answer="r"), "rows", {"hub": "a/b", "prompt": "{q}", "answer": "r"}),
    ],
)
def test_an_object_has_the_name_that_makes_it_again(task: Any, name: str, options: dict) -> None:
    assert name_and_options(task) == (name.format(here=__name__), options)


@pytest.mark.unchecked
def test_the_class_of_a_file_has_the_files_name_and_a_local_one_its_own(folder: Path) -> None:
    assert name_and_options(get_task("own/mirror.py:Outer.Inner"))[0] == "Inner"  # its size is not known

    class Local(SimpleTask):
        pass

    assert name_and_options(Local()) == ("Local", {})
    assert name_and_options(type("Mine", (type(get_task("countdown")),), {"__module__": "none"})()) == ("none:Mine", {})

    class Other(type(get_task("countdown"))):
        extra = 1

    assert name_and_options(Other()) == ("Other", {})  # not the built-in one
    for wrong in (Local, 3):
        with pytest.raises(ValueError, match=r"task is .*, (a class: call it|which has no train).*it must be a task"):
            name_and_options(wrong)
    Local.name = "a/b"
    with pytest.raises(ValueError, match="task 'a/b' gives its name to files of the run: use only letters"):
        name_and_options(Local())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("text", "field 'row' is 'text': it should be a mapping with `prompt`"),
        ({"answer": "1"}, "field 'prompt' is None: it should be text that is not empty, or a list of messages"),
        ({"prompt": [{"role": "usr", "content": "a"}]}, r"field 'prompt\[0\]\.role' is 'usr'"),
        (("a", ["b"]), r"field 'answer' is \['b'\]: it should be text or a number"),
        ({"prompt": "a", "id": 1.5}, r"field 'id' is 1\.5"),
    ],
)
def test_a_row_that_is_not_one_is_named(row: Any, says: str) -> None:
    class Rows(SimpleTask):
        def rows(self, split: str) -> list:
            return [("fine", "1"), row]

    with pytest.raises(ValueError, match=rf"the test rows of Rows, row 1: {says}"):
        Rows().test()


def test_rows_of_every_form_and_without_end() -> None:
    class Endless(SimpleTask):
        def rows(self, split: str) -> Any:
            yield {"prompt": [{"role": "user", "content": split}], "answer": 1.5, "id": "a", "kind": 2}
            yield Example("a", "whole", None)
            while True:
                yield "again", None

    first, second, *rest = Endless().train(5)
    assert first == Example("a", ({"role": "user", "content": "train"},), "1.5", {"kind": 2})
    assert second.id == "a#1" and [e.id for e in rest] == ["2", "3", "4"] and rest[0].answer is None
    with pytest.raises(NotImplementedError, match="SimpleTask has no method rows: give it a method rows"):
        SimpleTask().train()
    with pytest.raises(NotImplementedError, match="Endless has no method score: give it a method score"):
        Endless().score(second, "")


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("value", "reward", "answer"),
    [(True, 1, 1), (0, 0, 0), (np.float32(0.5), 0.5, 0), (np.True_, 1, 1), (-2.5, -2.5, 0)],
)
def test_a_number_is_a_score(value: Any, reward: float, answer: float) -> None:
    assert as_score(value) == Score(float(reward), {"answer": float(answer)})
    assert as_score(Score(value, {"answer": 0.25, "x": value})) == Score(
        float(reward), {"answer": 0.25, "x": float(reward)}
    )


@pytest.mark.unchecked
@pytest.mark.parametrize("value", [None, "1.0", (1.0,), ("high", {}), (1.0, {"x": None})])
def test_what_is_no_number_is_no_score(value: Any) -> None:
    with pytest.raises(TypeError, match="it must be a number, or a Score of numbers"):
        as_score(Score(*value) if value and len(value) == 2 else value)


def test_an_accuracy_is_a_share() -> None:
    with pytest.raises(ValueError, match="the part 'answer' must be 0 to 1, since its mean is the accuracy"):
        as_score(Score(1.0, {"answer": 2.0}))
