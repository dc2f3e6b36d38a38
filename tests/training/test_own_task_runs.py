"""Runs of tasks from outside the package: trained, resumed, evaluated, exported and reported by one name."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from configs.lab import get_config
from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.plotting.runs import read_run
from es_jax.report import write_report
from es_jax.rundir import directory
from es_jax.rundir.metrics import read_jsonl
from es_jax.tasks import Example, Score, SimpleTask
from es_jax.training.config import freeze, read_config
from es_jax.training.loop import run
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
import time
from es_jax import SimpleTask

class Reverse(SimpleTask):
    def __init__(self, size: int = 8, wait: str = ""):
        self.size, self.wait = size, wait

    def rows(self, split):
        return [(f"R{i:05}=", f"{i:05}"[::-1]) for i in range(self.size)]

    def score(self, example, completion):
        if example.id == self.wait:
            time.sleep(60)
        return sum(a == b for a, b in zip(completion, example.answer)) / 5
"""
NAME = "tasks/reverse.py:Reverse"


def config_of(argument: str = "population=4", **task):
    config = get_config(f"steps=2,{argument}")
    config.evals.every, config.evals.rows, config.evals.tasks, config.mesh.groups = 2, 4, (), 1
    config.task.name, config.task.train_size, config.task.prompts_per_step = NAME, 8, 4
    config.task.update(task)
    return config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a task file."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/reverse.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@dataclasses.dataclass(frozen=True)
class Digits(SimpleTask):
    """As many digits as may be; its class says all."""

    size: int = 8

    def rows(self, split):
        return [{"prompt": f"R{i:05}=", "kind": split} for i in range(self.size)]

    def score(self, example: Example, completion: str) -> Score:
        digits = sum(map(str.isdecimal, completion))
        return Score(float(digits), {"answer": float(digits == 5), "digits": float(digits)})


@pytest.mark.parametrize("argument", ["population=4", "grpo,n=2"])
def test_one_name_trains_resumes_evaluates_exports_and_reports(folder, caplog, argument):
    caplog.set_level(logging.WARNING, "es_jax")
    with jax.numpy_dtype_promotion("standard"):  # optax's adamw needs it
        result = run(config_of(argument, options={"size": 9}), "one")
        assert result.heldout["step"] == 2 and result.reward is not None
        facts = directory.read(Path("one"))
        assert facts["config"]["task"]["name"] == NAME and facts["config"]["task"]["options"] == {"size": 9}
        (digest,) = facts["task_sources"].values()
        config = config_of(argument, options={"size": 9})
        config.train.steps = 3
        run(config, "one")
        assert "changed" not in caplog.text and directory.read(Path("one"))["task_sources"] == facts["task_sources"]
        (folder / "tasks/reverse.py").write_text(SOURCE + "# another one\n")
        config.train.steps = 4
        run(config, "one")
        assert "the source of task 'reverse.Reverse' changed since" in caplog.text
        now = directory.read(Path("one"))
        assert now["task_sources"]["reverse.Reverse"] != digest
        assert now["resumed"][-1]["task_sources"] == {"reverse.Reverse": digest}
        config.task.options = {"size": 8}
        with pytest.raises(ValueError, match=r"another config: task\.options was \{'size': 9\} and is \{'size': 8\}"):
            run(config, "one")
    caplog.clear()
    result = evaluate_run("one", steps=[0, 4], out="evals")
    assert [row["step"] for row in result["tasks"]["reverse.Reverse"]] == [0, 4] and not result["warnings"]
    config.task.name, config.task.options = str(folder / NAME), {"size": 9}  # the same file by another path
    with jax.numpy_dtype_promotion("standard"):
        run(config, "one")
    (folder / "tasks/reverse.py").write_text(SOURCE + "# a third one\n")
    result = evaluate_run("one", tasks=[NAME, "lab-add"], steps=[4], out="evals")
    assert set(result["tasks"]) == {"reverse.Reverse", "lab-add"} and len(result["warnings"]) == 1
    export_run("one", "exported", step=4)
    card = (folder / "exported/README.md").read_text()
    assert NAME in card and '"accuracy"' in card
    (folder / "tasks/reverse.py").unlink()  # a report reads what is written
    assert read_run("one").target == "reverse.Reverse"
    report = write_report(["one"], "report")
    assert "reverse.Reverse" in (folder / "report/report.html").read_text() and report["results"]


def test_a_task_itself_from_python(folder):
    """Its class tells its options, so that its run can be evaluated by name as well."""
    config = config_of(name="countdown")
    result = run(config, "run", task=Digits(size=9))
    assert read_jsonl(Path("run/metrics.jsonl"))[0]["digits"] == result.reward
    task = read_config(Path("run")).task
    assert task.name == f"{__name__}:Digits" and task.options == {"size": 9}
    name = f"{__name__}.Digits"
    rows = [evaluate_run("run", tasks=tasks, out="evals")["tasks"] for tasks in (None, [Digits(size=9)], [task.name])]
    assert rows[0] == rows[1] == rows[2] and [row["step"] for row in rows[0][name]] == [0, 2]
    assert rows[0][name][0]["digits"] == pytest.approx(rows[0][name][0]["reward"])
    config.train.steps = 3
    assert run(config, "run", task=Digits(size=9)).step == 3


def test_a_task_that_no_name_makes_again(folder):
    class Local(Digits):
        def __init__(self, words):
            self.words = words

        def rows(self, split):
            return [(word, "5") for word in self.words]

    task = Local(["R12345=", "R54321="] * 4)
    run(config_of(), "run", task=task)
    assert read_config(Path("run")).task.name == "Local" and directory.read(Path("run"))["task_sources"]
    with pytest.raises(ValueError, match=r"unknown task 'Local'.*an object to run and evaluate_run"):
        evaluate_run("run")
    assert list(evaluate_run("run", tasks=[task])["tasks"]) == ["Local"]
    with pytest.raises(ValueError, match=r"task\.grader is 'strict', but the task is given as an object"):
        run(config_of(grader="strict"), "other", task=task)
    assert not Path("other").exists()


def test_own_tasks_watch_what_is_forgotten_too(folder):
    config = config_of(name="lab-countdown")
    config.evals.tasks = (NAME, "lab-add")
    run(config, "run")
    assert {path.stem for path in Path("run/evals").glob("*.jsonl")} == {"lab-countdown", "reverse.Reverse", "lab-add"}
    (folder / "more").mkdir()
    (folder / "more/reverse.py").write_text(SOURCE)
    config.evals.tasks = (NAME, "more/reverse.py:Reverse")
    with pytest.raises(ValueError, match=r"would both be named 'reverse\.Reverse' in files: rename one"):
        run(config, "other")
    with pytest.raises(ValueError, match=r"evals\.tasks: unknown task 'revers'"):
        freeze({"evals": {"tasks": ["revers"]}})
    helpers.edit_config(Path("run"), evals={"tasks": [NAME, "of a package that is gone"]})
    assert read_run("run").step == 2 and export_run("run", "exported")["step"] == 2


@pytest.mark.parametrize("method", ["population=4", "grpo,n=2"])
def test_a_score_that_blocks_ends_the_run_with_its_row(folder, method):
    began = time.monotonic()
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(
            ValueError, match=r"could not score example '3': it took longer than task\.timeout_seconds = 0\.5"
        ),
    ):
        run(config_of(method, options={"wait": "3"}, timeout_seconds=0.5), "run")
    assert time.monotonic() - began < 60


FAULTS = {
    "score": ("return sum", "return 1 / 0  # ", "could not score example '0': ZeroDivisionError: division by zero"),
    "none": (
        "return sum",
        "return None  # ",
        "could not score example '0': TypeError: score returned None: it must be",
    ),
    "nan": ("return sum", "return float('nan')  # ", "has scores that are not finite: row '0' (reward nan)"),
    "rows": (
        "return [(f",
        "raise KeyError('text')  # ",
        "the train rows of task 'tasks/reverse.py:Reverse' raised KeyError",
    ),
    "few": ("range(self.size)", "range(2)", "n is 8, but the train rows of Reverse has 2 examples"),
    "answer": ('f"{i:05}"[::-1])', "[i])", "row 0: field 'answer' is [0]: it should be text or a number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_task_does_wrong_is_one_sentence(folder, fault):
    old, new, says = FAULTS[fault]
    (folder / "tasks/reverse.py").write_text(SOURCE.replace(old, new))
    with pytest.raises(ValueError) as error:
        run(config_of(), "run")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (
            {"options": {"sise": 3}},
            "task.options.sise is 3: unknown option of task 'tasks/reverse.py:Reverse' 'sise': did",
        ),
        ({"grader": "strict"}, "task.grader is 'strict': unknown option of task 'tasks/reverse.py:Reverse' 'grader'"),
        ({"name": "gsm8k", "hub": "a/b"}, "task.hub is 'a/b': unknown option of task 'gsm8k' 'hub'. Known: data_dir"),
        (
            {"name": "lab-add", "seed": 1, "options": {"seed": 2}},
            "task.seed and task.options.seed are both set: keep one",
        ),
        ({"options": {"size": object}}, "task.options.size is <class 'object'>: it must be text, a number"),
        ({"options": 3}, "task.options is 3: it must be a group of options by name"),
        ({"timeout_seconds": 0.0}, "task.timeout_seconds is 0.0: it must be finite and above 0"),
    ],
)
def test_a_wrong_field_is_named_before_anything_starts(folder, task, says):
    fields = {"model": {"source": "lab"}, "task": {"name": NAME} | task}
    with pytest.raises(ValueError) as error:
        run(fields, "run")
    assert says in str(error.value) and not Path("run").exists()


def test_rows_by_columns_train_and_are_evaluated(folder):
    (folder / "rows").mkdir()
    lines = [json.dumps({"question": f"R{i:05}", "key": f"{i:05}"[::-1]}) for i in range(12)]
    (folder / "rows/train.jsonl").write_text("\n".join(lines))
    (folder / "judge.py").write_text("def first(example, completion): return completion[:1] == example.meta['key'][0]")
    fields = {"name": "rows", "data_dir": "rows", "prompt": "{question}=", "answer": "key", "options": {"test_rows": 4}}
    for grader, accuracy in (("exact", 1.0), ("judge.py:first", 1.0), ("choice", None)):
        config = config_of(**fields, grader=grader)
        if accuracy is None:
            with pytest.raises(ValueError, match="field 'key' is '00000': it should be a letter"):
                run(config, "choice")
            continue
        result = run(config, f"{grader.partition('.')[0]}-run")
        assert result.heldout["accuracy"] == accuracy and result.heldout["n"] == 4
        (row, last) = evaluate_run(result.workdir, out=f"evals/{result.workdir}")["tasks"]["rows"]
        assert row["accuracy"] == last["accuracy"] == accuracy
    assert list(directory.read(Path("judge-run"))["task_sources"]) == ["rows"]
    assert "task_sources" not in directory.read(Path("exact-run"))
    labels = write_report(["exact-run", "judge-run"], "report", mark=True)["series"]
    assert len(labels) == 2


def test_a_run_from_before_the_fields_goes_on(folder):
    """Its config.json has no options, and neither have the marks of its evaluations."""
    config = config_of(name="lab-countdown")
    run(config, "run")
    evaluate_run("run", out="run/evals")
    new = ("hub", "prompt", "answer", "options", "timeout_seconds")
    content = json.loads(Path("run/config.json").read_text())
    del content["sha256"]
    for field in new:
        del content["config"]["task"][field]
    Path("run/config.json").write_text(json.dumps(content))
    subject = json.loads(Path("run/evals/subject.json").read_text())
    subject["marks"] = {
        name: value for name, value in subject["marks"].items() if name.removeprefix("task.") not in new
    }
    Path("run/evals/subject.json").write_text(json.dumps(subject))
    assert read_config(Path("run")).task.options == {}
    config.train.steps, config.task.timeout_seconds = 3, 60.0  # which may change
    assert run(config, "run").step == 3
    assert [row["step"] for row in evaluate_run("run", steps=[3])["tasks"]["lab-countdown"]] == [0, 3]
    with pytest.raises(ValueError, match=r"task\.options was \{\} and is \{'seed': 3\}"):
        config.task.options.seed = 3
        run(config, "run")


def test_the_example_of_the_docs_trains(folder):
    """With a model that has a chat template; 20 lines in all."""
    text = (ROOT / "docs/tasks.md").read_text()
    (block,) = re.findall(r"```python\n(from es_jax import SimpleTask.*?)```", text, flags=re.S)
    assert len(block.splitlines()) <= 20
    (folder / "my_task.py").write_text(block)
    config = helpers.config_of(helpers.tiny_model(folder / "model"), helpers.TWO_STEPS)
    result = run(config, "run", task="my_task.py:Initials")
    assert result.step == 2 and read_config(Path("run")).task.name == "my_task.py:Initials"
    (row,) = evaluate_run("run", steps=[0], options=Options(rows=16))["tasks"]["my_task.Initials"]
    assert row["n"] == 16 and row["accuracy"] == 0 and -1 < row["reward"] < 1  # random weights


@pytest.mark.slow
def test_the_commands_take_the_name_and_its_options(folder):
    """Of another working directory's module too, and the error is one line."""
    fields = ["task.train_size=8", "task.prompts_per_step=4", "train.steps=1", "evals.rows=4", "evals.tasks="]

    def command(name: str, *arguments: str):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-m", f"es_jax.{name}", *arguments], capture_output=True, text=True, env=env
        )

    train = [f"--config={ROOT}/configs/lab.py:population=2", *(f"--config.{field}" for field in fields)]
    train += ["--config.task.name=reverse:Reverse", "--config.task.options.size=9", "--workdir=run"]
    out = command("train", *train)
    assert out.returncode == 1 and out.stderr.splitlines()[-1].startswith(
        "es_jax.train: 'reverse:Reverse' cannot be loaded"
    )
    (folder / "reverse.py").write_text(SOURCE)
    out = command("train", *train)
    assert out.returncode == 0, out.stderr
    assert json.loads((folder / "run/config.json").read_text())["config"]["task"]["options"] == {"size": 9}
    out = command("evaluate", "--workdir=run", "--json", "--rows=3", "--out=evals")
    assert list(json.loads(out.stdout)["tasks"]) == ["reverse.Reverse"], out.stderr
