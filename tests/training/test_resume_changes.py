"""What may change when a run goes on, what the seed log tells of it, and what is refused."""

import json
import logging
import os
import shutil

import pytest

from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.plotting.runs import read_run
from es_jax.rundir import directory
from es_jax.rundir.directory import claim
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.seed_log import Change, SeedLog, digest, read_entries
from es_jax.training import loop
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from tests.helpers import TWO_STEPS, Killed, config_of, edit_config, host, same

FIELDS = TWO_STEPS | {
    "task": {"name": "conciseness", "train_size": 3},
    "es": {"population": 2, "sigma": 0.05, "rewards": "random"},
    "evals": {"every": 1, "rows": 2},
}
NEWER = ("training_rows", "test_rows", "places", "workdir", "sha256")  # than earlier versions' config.json


@pytest.fixture(scope="module")
def begun(tiny_model, tmp_path_factory):
    """A run of two steps, of which copies go on."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    run(config_of(tiny_model, FIELDS), workdir)
    return workdir


@pytest.fixture
def copy(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def lines(workdir):
    return [json.loads(line) for line in (workdir / "seedlog.jsonl").read_text().splitlines()]


def test_sizes_of_decoding_may_change_and_the_log_tells_it(tiny_model, copy, caplog):
    before = digest(copy, 2)
    with caplog.at_level(logging.WARNING):
        result = run(config_of(tiny_model, FIELDS, decode={"slots": 3}, train={"steps": 3}), copy)
    (text,) = [record.message for record in caplog.records if "decode.slots" in record.message]
    assert text.startswith("decode.slots was 2 and is 3: completions from now on may differ")
    assert [line.get("step") for line in lines(copy)] == [1, 2, None, 3]
    told = lines(copy)[2]
    assert told.pop("sum") and told == {"after": 2, "changed": {"decode.slots": [2, 3]}}
    rebuilt = {step: host(params) for step, params in replay(copy)}
    assert sorted(rebuilt) == [0, 1, 2, 3] and same(rebuilt[3], result.params)
    assert digest(copy, 2) == before and len(read_entries(copy)) == 3
    again = run(config_of(tiny_model, FIELDS, decode={"slots": None, "members_at_once": 2}, train={"steps": 4}), copy)
    kept = directory.read(copy)["config"]["decode"]
    assert (kept["slots"], kept["members_at_once"]) == (3, 2) and again.step == 4
    assert lines(copy)[4]["changed"] == {"decode.members_at_once": [1, 2]} and lines(copy)[4]["after"] == 3
    rows = evaluate_run(copy, steps=[4], options=Options(rows=2))["tasks"]["conciseness"]
    assert [row["step"] for row in rows] == [0, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: {**line, "after": 1}, "its numbers are not those of its sum"),
        (lambda line: {name: value for name, value in line.items() if name != "sum"}, "not those of its sum"),
        (lambda line: {**line, "changed": {"decode.slots": [2, 1]}}, "its numbers are not those of its sum"),
    ],
)
def test_a_damaged_line_about_sizes_is_named(change, says, copy):
    log = SeedLog(copy)
    log.resize({"decode.slots": (2, 3), "decode.members_at_once": (1, 1)})
    log.resize({"decode.slots": (2, 3), "decode.members_at_once": (1, 1)})  # what the log says already
    assert SeedLog(copy).changes == log.changes == [Change(2, {"decode.slots": [2, 3]})]
    path = copy / "seedlog.jsonl"
    *first, last = path.read_text().splitlines()
    path.write_text("\n".join([*first, json.dumps(change(json.loads(last)))]) + "\n")
    with pytest.raises(ValueError, match=rf"seedlog\.jsonl line 3 cannot be read .*{says}"):
        read_entries(copy)


def test_a_change_where_no_step_is_before_it_is_a_missing_line(copy):
    log = SeedLog(copy)
    log.resize({"decode.slots": (2, 3)})
    path = copy / "seedlog.jsonl"
    first, _, told = path.read_text().splitlines(keepends=True)
    path.write_text(first + told)
    with pytest.raises(ValueError, match=r"line 2 is a change after step 2: lines are missing"):
        read_entries(copy)


@pytest.mark.parametrize(("step", "left"), [(0, [0]), (1, [1, 0]), (2, [1, 2, 0])])
def test_steps_that_are_made_again_keep_what_changed_since(step, left, copy):
    log = SeedLog(copy)
    log.resize({"decode.slots": (2, 3)})
    log.cut(step)
    assert [line.get("step", 0) for line in lines(copy)] == left
    assert SeedLog(copy).changes == log.changes == [Change(step, {"decode.slots": [2, 3]})]
    assert len(log.entries) == len(read_entries(copy)) == step


def test_other_rows_and_tasks_are_evaluated_from_now_on(tiny_model, copy, capsys):
    """What was there stays, apart, and comes back with its rows."""
    old = (copy / "evals/conciseness.jsonl").read_bytes()
    marks = directory.read(copy)["rows"]
    evals = {"rows": 3, "tasks": ("lab-add",)}
    run(config_of(tiny_model, FIELDS, evals=evals, train={"steps": 3}), copy)
    assert "conciseness: evaluated on other held-out rows from here on" in capsys.readouterr().err
    (earlier,) = (copy / "evals/earlier").iterdir()
    assert (earlier / "conciseness.jsonl").read_bytes() == old
    rows = {name: read_jsonl(copy / f"evals/{name}.jsonl") for name in ("conciseness", "lab-add")}
    for of_task in rows.values():
        assert [(row["step"], row["n"]) for row in of_task] == [(2, 3), (3, 3)]
    assert "accuracy_change" not in rows["conciseness"][0]  # there is no step 0 of these rows
    assert {row["n"] for row in read_run(copy).evals["conciseness"]} == {3}
    evaluate_run(copy, steps=[0, 3])
    assert [row["step"] for row in read_run(copy).evals["conciseness"]] == [0, 2, 3]
    run(config_of(tiny_model, FIELDS, train={"steps": 3}), copy)
    rows = read_jsonl(copy / "evals/conciseness.jsonl")
    assert [(row["step"], row["n"]) for row in rows] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert "accuracy_change" in rows[-1]
    assert directory.read(copy)["rows"] == marks and set(directory.read(copy)["test_rows"]) == {"conciseness"}


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"es": {"sigma": 0.06}}, r"es\.sigma was 0\.05 and is 0\.06"),
        ({"decode": {"max_new_tokens": 3}}, r"decode\.max_new_tokens was 2 and is 3"),
        ({"optim": {"anchor": {"penalty": "l2", "strength": 1.0}}}, r"optim\.anchor\.penalty was 'none' and is 'l2'"),
        ({"model": {"source": "{other}"}}, r"config: digest was '\w{64}' and is '\w{64}'; files\."),
        ({"model": {"source": "{run}@1"}}, r"holds a run that began from '\S+', and not from '\S+@1'"),
    ],
)
def test_what_a_step_depends_on_is_refused(groups, says, tiny_model, copy, tmp_path):
    source = groups.get("model", {}).get("source", str(tiny_model)).format(run=copy, other=tmp_path / "other")
    if "other" in source:
        export_run(copy, tmp_path / "other", step=1)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and "cache" not in path.parts}
    groups = {"decode": {"slots": 3}} | groups | {"model": {"source": source}}
    with pytest.raises(ValueError, match=says):
        run(config_of(tiny_model, FIELDS, **groups), copy)
    assert {path: path.read_bytes() for path in before} == before  # and the log was not told of the slots


def test_no_step_depends_on_the_held_out_rows(tiny_model, tmp_path, monkeypatch):
    """A longer prompt among them does not change the width of the members' prompts, and with it last bits."""
    packings, longest = [], []

    def stop(self, *arguments):
        packings.append(self.packing)
        longest.append(self.evaluator.engine.max_prompt_tokens)
        self.recorder.close()
        self.checkpoints.close()
        raise Killed

    monkeypatch.setattr(loop._Run, "train", stop)
    for number, tasks in enumerate([(), ("conciseness",)]):
        fields = {"task": {"name": "lab-add", "train_size": 3}, "evals": {"every": 1, "rows": 2, "tasks": tasks}}
        with pytest.raises(Killed):
            run(config_of(tiny_model, FIELDS, **fields), tmp_path / str(number))
    assert longest[0] < longest[1] and packings[0] == packings[1]


def test_test_rows_that_changed_by_themselves_are_refused(tiny_model, copy):
    edit_config(copy)
    content = json.loads((copy / "config.json").read_text())
    content["test_rows"]["conciseness"] = "0" * 16
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"held-out rows of conciseness, .* \(test_rows\.conciseness was '0{16}' and is"
    ):
        run(config_of(tiny_model, FIELDS), copy)


def test_a_run_of_an_earlier_version_goes_on(tiny_model, copy):
    """Its config.json has one sum of all rows, and no places."""
    content = json.loads((copy / "config.json").read_text())
    content = {name: value for name, value in content.items() if name not in NEWER}
    (copy / "config.json").write_text(json.dumps(content))
    other = config_of(tiny_model, FIELDS, evals={"rows": 3}, train={"steps": 3})
    with pytest.raises(ValueError, match=r"rows was .* of an earlier version, whose sum of rows has the held-out ones"):
        run(other, copy)
    assert run(config_of(tiny_model, FIELDS), copy).step == 2
    assert run(other, copy).step == 3


def test_a_model_may_be_elsewhere(tiny_model, copy, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "models/moved")
    assert run(config_of(tmp_path / "models/moved", FIELDS, train={"steps": 3}), copy).step == 3
    assert directory.read(copy)["config"]["model"]["source"] == str(tmp_path / "models/moved")


def test_a_moved_run_finds_its_model_from_anywhere(tiny_model, begun, tmp_path, monkeypatch):
    """As given from here, then beside the run, then where it was; and all of these are named where it is in none."""
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    shutil.copytree(tiny_model, "models/tiny")
    config = config_of("models/tiny", FIELDS, evals={"every": 0})
    final = host(run(config, "runs/one").params)
    content = directory.read(tmp_path / "old/runs/one")
    assert content["places"] == {"models/tiny": str(tmp_path / "old/models/tiny")}
    assert content["config"]["model"]["source"] == "models/tiny"
    monkeypatch.chdir("/")
    ((_, there),) = replay(tmp_path / "old/runs/one", steps=[2])
    assert same(there, final)
    os.rename(tmp_path / "old", tmp_path / "new")
    assert run(config, tmp_path / "new/runs/one").step == 2  # the same command from another folder
    monkeypatch.chdir(tmp_path)
    shutil.move("new/runs/one", "alone")
    assert evaluate_run("alone", steps=[2], options=Options(rows=2))["tasks"]["conciseness"][1]["step"] == 2
    os.rename("new/models", "new/gone")
    places = [tmp_path / "models/tiny", tmp_path / "new/models/tiny"]
    with pytest.raises(FileNotFoundError, match=rf"is not there any more; looked for {places[0]}, .*{places[1]}: put"):
        evaluate_run("alone", steps=[2])
    os.rename("new/gone", "models")
    assert run(config, "alone").step == 2


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"model": {"source": "nowhere"}}, "'nowhere' is not a folder"),
        ({"decode": {"max_prompt_tokens": 3}}, r"raise decode\.max_prompt_tokens"),
        ({"decode": {"max_new_tokens": 10**6}}, r"decode\.max_new_tokens"),
        ({"mesh": {"model": 3}}, "mesh"),
    ],
)
def test_a_start_that_fails_leaves_nothing(groups, says, tiny_model, tmp_path):
    with pytest.raises((ValueError, OSError), match=says):
        run(config_of(tiny_model, FIELDS, **groups), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises((ValueError, OSError), match=says):
        run(config_of(tiny_model, FIELDS, **groups), tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "mine/.lock").exists()


def test_a_lock_is_one_of_a_directory_and_is_gone_afterwards(tmp_path):
    with claim(tmp_path / "run"):
        assert (tmp_path / "run/.lock").exists()
        with pytest.raises(OSError, match="in use by another process"), claim(tmp_path / "run"):
            pass
        assert (tmp_path / "run/.lock").exists()  # the other one did not take it along
        (tmp_path / "run/config.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    with claim(tmp_path / "run"):
        pass
