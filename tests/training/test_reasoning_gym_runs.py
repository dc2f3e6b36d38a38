"""Runs on tasks of reasoning-gym: trained, resumed and evaluated on rows that are made once and kept. Where the library
is not installed a stub takes its place."""

import json
import logging
import shutil

import jax
import pytest

from es_jax.core.mesh import make_mesh
from es_jax.evals.runner import Options, evaluate_run
from es_jax.rundir.metrics import read_jsonl
from es_jax.tasks import Example, SimpleTask, reasoning_gym
from es_jax.tasks.reasoning_gym_scorers import VERSION
from es_jax.training import kept_rows
from es_jax.training.loop import run
from tests import helpers, reasoning_gym_stub

TARGET, PRIOR = "reasoning_gym:chain_sum", "reasoning_gym:word_sorting"
FIELDS = {
    "task": {"name": TARGET, "train_size": 3, "options": {"max_terms": 3}},
    "es": {"population": 2, "sigma": 0.05},
    "decode": {"max_prompt_tokens": 600, "max_new_tokens": 2, "slots": 2},
    "train": {"steps": 1, "checkpoint_every": 1},
    "evals": {"every": 2, "rows": 2, "tasks": (PRIOR,)},
    "mesh": {"groups": 1},
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    if not reasoning_gym_stub.REAL:
        monkeypatch.syspath_prepend(str(reasoning_gym_stub.write(tmp_path / "site", VERSION)))
    reasoning_gym._drawn.cache_clear()


def no_more_rows(monkeypatch):
    def never(*args):
        raise AssertionError("rows were made anew")

    monkeypatch.setattr(reasoning_gym, "_drawn", never)


def test_a_run_keeps_its_rows_and_whoever_goes_on_reads_them(tmp_path, monkeypatch, library, caplog):
    source = helpers.tiny_model(tmp_path / "model")
    config = helpers.config_of(source, FIELDS)
    work = tmp_path / "run"
    assert run(config, work).step == 1
    files = [f"reasoning_gym.{name}.jsonl" for name in ("chain_sum.test", "chain_sum.train", "word_sorting.test")]
    assert sorted(path.name for path in (work / "tasks").iterdir()) == files
    header, *rows = map(json.loads, (work / "tasks" / files[1]).read_text().splitlines())
    assert header.pop("sha256") and len(rows) == 3
    assert header == {"task": TARGET, "options": {"max_terms": 3}, "reasoning_gym": VERSION}
    assert rows[0]["prompt"][0]["content"].endswith(reasoning_gym.ASK)
    assert {"format", "answer"} <= set(read_jsonl(work / "metrics.jsonl")[0])

    no_more_rows(monkeypatch)
    before = {path: path.read_bytes() for path in (work / "tasks").iterdir()}
    assert run(helpers.config_of(source, FIELDS, train={"steps": 2}), work).step == 2
    result = evaluate_run(work, steps=[0], tasks=[TARGET, PRIOR], mesh=make_mesh(1, 1, devices=jax.devices()[:1]))
    assert list(result["tasks"]) == [name.replace(":", ".") for name in (TARGET, PRIOR)]
    assert before == {path: path.read_bytes() for path in (work / "tasks").iterdir()} and "sha256" not in caplog.text
    assert not (work / "evals/tasks").exists()
    run(helpers.config_of(source, FIELDS, train={"seed": 1}), tmp_path / "branch", branch_from=f"{work}@1")
    assert {path.name: path.read_bytes() for path in (tmp_path / "branch/tasks").iterdir()} == {
        path.name: content for path, content in before.items()
    }

    path = work / "tasks" / files[1]
    path.write_text(path.read_text().replace(rows[0]["answer"], "0", 1) if rows[0]["answer"] != "0" else "")
    with pytest.raises(ValueError, match="holds a run of another config: training_rows was"):
        run(helpers.config_of(source, FIELDS, train={"steps": 3}), work)
    assert f"{path} is not as it was written, by its sha256" in caplog.text


class Kept(SimpleTask):
    """A task whose rows are another time others."""

    name = "kept"
    made = 0

    def __init__(self, options=1):
        self.options = options

    def kept_as(self):
        return {"task": self.name, "options": self.options}

    def train(self, n=None):
        self.made += 1
        prompts = [f"row {i}" if i % 2 else ({"role": "user", "content": f"row {i}"},) for i in range(n)]
        return [Example(str(i), prompt, None, {"time": self.made}) for i, prompt in enumerate(prompts)]


def test_kept_rows_are_read_and_those_of_another_task_are_not(tmp_path, caplog):
    task, folders = Kept(), (tmp_path / "a", tmp_path / "b")
    rows = kept_rows.rows(task, "train", 4, "kept", folders)
    assert rows == Kept().train(4)  # as made: a prompt is text, or a tuple
    kept_rows.keep(task, "train", "kept", rows, folders)
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["kept.train.jsonl"] and not (tmp_path / "a").exists()
    assert kept_rows.rows(task, "train", 4, "kept", folders) == rows and task.made == 1
    assert kept_rows.rows(task, "train", 3, "kept", folders) == rows[:3] and task.made == 1
    content = (tmp_path / "b/kept.train.jsonl").read_bytes()
    kept_rows.keep(task, "train", "kept", rows[:3], folders)
    assert (tmp_path / "b/kept.train.jsonl").read_bytes() == content and not caplog.text
    more = kept_rows.rows(task, "train", 5, "kept", folders)
    assert len(more) == 5 and task.made == 2
    assert "kept: 5 train rows are asked for and 4 kept, and those made now differ from those kept" in caplog.text
    other = Kept(options=2)
    assert len(kept_rows.rows(other, "train", 4, "kept", folders)) == 4 and other.made == 1
    kept_rows.keep(other, "train", "kept", rows[:1], folders)
    assert json.loads((tmp_path / "b/kept.train.jsonl").read_text().partition("\n")[0])["options"] == 2


DAMAGED = ["", "no json\n", "{}\n", "[]\n", '{"sha256": ""}\n{"id": 1}\n', '{"sha256": ""}\n[]\n']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_of_rows_is_named(tmp_path, content):
    (tmp_path / "kept.train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"kept\.train\.jsonl is damaged .*: restore it, or delete it for new rows"):
        kept_rows.rows(Kept(), "train", 2, "kept", (tmp_path,))


def test_rows_that_were_changed_are_told(tmp_path, caplog):
    folders = (tmp_path,)
    kept_rows.keep(Kept(), "train", "kept", Kept().train(2), folders)
    path = tmp_path / "kept.train.jsonl"
    path.write_text(path.read_text().replace("row 1", "row 7"))
    with caplog.at_level(logging.WARNING):
        rows = kept_rows.rows(Kept(), "train", 2, "kept", folders)
    assert rows[1].prompt == "row 7" and f"{path} is not as it was written, by its sha256" in caplog.text


def test_other_tasks_keep_nothing(tmp_path):
    class Plain(SimpleTask):
        def rows(self, split):
            return [("?", "!")]

    assert kept_rows.rows(Plain(), "train", 1, "plain", (tmp_path,)) == Plain().train()
    kept_rows.keep(Plain(), "train", "plain", Plain().train(), (tmp_path,))
    assert not [*tmp_path.iterdir()]


def test_an_evaluation_keeps_the_rows_that_a_run_has_not(tmp_path, monkeypatch, library):
    """Beside its results; the run's own folder stays as it is."""
    source = helpers.tiny_model(tmp_path / "model")
    out, options = tmp_path / "out", Options(rows=2, max_prompt_tokens=600, max_new_tokens=2)
    evaluate_run(source, tasks=[PRIOR], out=out, options=options, mesh=make_mesh(1, 1, devices=jax.devices()[:1]))
    assert [path.name for path in (out / "tasks").iterdir()] == ["reasoning_gym.word_sorting.test.jsonl"]
    no_more_rows(monkeypatch)
    again = tmp_path / "again"
    shutil.copytree(out / "tasks", again / "tasks")
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    result = evaluate_run(source, tasks=[PRIOR], out=again, options=options, mesh=mesh)
    assert len(result["tasks"]["reasoning_gym.word_sorting"]) == 1
