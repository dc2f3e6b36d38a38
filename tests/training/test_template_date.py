"""A run has one date: it goes on the next day, and what is made of it afterwards has the same prompts."""

import datetime
import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from es_jax.core import processes
from es_jax.evals import weight_source
from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.plotting import read_run
from es_jax.plotting.runs import group, incomparable
from es_jax.training import loop
from es_jax.training.config import freeze, read_config
from es_jax.training.loop import run
from es_jax.weights.chat_template import set_date
from es_jax.weights.model import load_outline
from es_jax.weights.tokenizer import render
from tests.helpers import config_of

FIELDS = {
    "task": {"name": "conciseness", "train_size": 2},
    "es": {"population": 2, "sigma": 0.05},
    "decode": {"max_prompt_tokens": 200, "max_new_tokens": 2, "slots": 2},
    "train": {"steps": 1, "checkpoint_every": 1},
    "evals": {"every": 1, "rows": 2},
}
GRPO = FIELDS | {"method": "grpo", "grpo": {"rollouts": 2}, "evals": {"every": 0}}
FIRST, SECOND = "2026-11-27", "2026-11-28"


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A model whose chat template writes the day, and the second."""
    folder = tmp_path_factory.mktemp("dated") / "model"
    shutil.copytree(tiny_model, folder)
    template = folder / "chat_template.jinja"
    template.write_text("Today Date: {{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + template.read_text())
    return folder


@pytest.fixture
def on(monkeypatch):
    """A function that sets the day."""

    def on(day):
        class Today(datetime.date):
            today = classmethod(lambda cls: datetime.date.fromisoformat(day))

        clock = types.SimpleNamespace(date=Today, datetime=datetime.datetime)
        for module in (loop, weight_source):
            monkeypatch.setattr(module, "datetime", clock)

    return on


def later(fields, steps=2):
    return fields | {"train": {"steps": steps, "checkpoint_every": 1}}


def date_of(workdir):
    return json.loads((workdir / "config.json").read_text())["config"]["model"]["template_date"]


def dateless(workdir):
    """Make it a directory from before runs had a date."""
    path = workdir / "config.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    del content["config"]["model"]["template_date"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("fields", [FIELDS, GRPO], ids=["es", "grpo"])
def test_a_run_goes_on_the_next_day(fields, model, tmp_path, on):
    on(FIRST)
    run(config_of(model, fields), tmp_path / "run")
    assert date_of(tmp_path / "run") == FIRST
    on(SECOND)
    result = run(config_of(model, later(fields)), tmp_path / "run")
    assert result.step == 2 and date_of(tmp_path / "run") == FIRST
    whole = run(config_of(model, later(fields), model={"template_date": FIRST}), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, result.params, whole.params)
    with pytest.raises(ValueError, match=rf"model\.template_date was '{FIRST}' and is '{SECOND}'"):
        run(config_of(model, later(fields, 3), model={"template_date": SECOND}), tmp_path / "run")


def test_what_is_made_of_a_run_has_its_date(model, tmp_path, on):
    on(FIRST)
    run(config_of(model, FIELDS), tmp_path / "run")
    on(SECOND)
    for _ in range(2):  # the folder's own rows, then none are due
        (row, last) = evaluate_run(tmp_path / "run")["tasks"]["conciseness"]
        assert row["rows"] == last["rows"]
    export_run(tmp_path / "run", tmp_path / "exported")
    assert f"| day in prompts | {FIRST} |" in (tmp_path / "exported" / "README.md").read_text()
    saved = (tmp_path / "exported" / "tokenizer_config.json").read_text()
    assert "template_date" not in saved and FIRST not in saved
    assert read_run(tmp_path / "run").config.model.template_date == FIRST
    with pytest.raises(ValueError, match="If the chat template writes the date, use the same --template_date"):
        evaluate_run(tmp_path / "run", options=Options(template_date=SECOND))
    other = evaluate_run(tmp_path / "run", options=Options(template_date=SECOND), out=tmp_path / "other")
    assert other["tasks"]["conciseness"][0]["rows"] != row["rows"]


def test_the_evaluation_of_a_model_goes_on_the_next_day(model, tmp_path, on):
    def evaluated(out, steps, **options):
        options = Options(rows=2, max_new_tokens=2, max_prompt_tokens=200, **options)
        rows = evaluate_run(model, base=str(model), tasks=["conciseness"], steps=steps, out=out, options=options)
        return rows["tasks"]["conciseness"][-1]["rows"]

    on(FIRST)
    first = evaluated(tmp_path / "a", [0])
    on(SECOND)
    assert evaluated(tmp_path / "a", [0, 1]) == first == evaluated(tmp_path / "b", [0], template_date=FIRST)
    assert evaluated(tmp_path / "c", [0]) != first
    subject = json.loads((tmp_path / "c" / "subject.json").read_text())
    assert subject["template_date"] == SECOND
    for damaged in (5, "yesterday", ["2026-11-28"]):
        (tmp_path / "c" / "subject.json").write_text(json.dumps(subject | {"template_date": damaged}))
        with pytest.raises(ValueError, match=r"subject\.json is damaged .*template_date is .*: it must be a day"):
            evaluated(tmp_path / "c", [0])


def test_a_run_from_before_the_field_asks_for_the_day(model, tmp_path, on):
    run(config_of(model, FIELDS, model={"template_date": FIRST}), tmp_path)
    dateless(tmp_path)
    assert read_config(tmp_path).model.template_date is None
    on(SECOND)
    config = config_of(model, later(FIELDS))
    with pytest.raises(ValueError, match=r"rows was .* set model\.template_date to the day the run began"):
        run(config, tmp_path)
    with pytest.raises(ValueError, match=r"rows was .* set model\.template_date to the day the run began"):
        run(config.with_date(SECOND), tmp_path)
    assert run(config.with_date(FIRST), tmp_path).step == 2 and date_of(tmp_path) == FIRST
    assert run(config, tmp_path).step == 2


def test_a_run_from_before_the_field_whose_template_has_no_date_goes_on(tiny_model, tmp_path, on):
    run(config_of(tiny_model, FIELDS), tmp_path)
    dateless(tmp_path)
    on(SECOND)
    assert run(config_of(tiny_model, later(FIELDS)), tmp_path).step == 2
    assert date_of(tmp_path) is None
    evaluate_run(tmp_path)


@pytest.mark.parametrize("members_at_once", [None, 1, 7])
def test_the_date_of_a_directory_without_a_step(members_at_once, model, tmp_path, on):
    """It is kept while the run is the same one, and else it is today. How many members run at once may have been
    chosen by the run."""
    config = config_of(model, FIELDS)
    on(FIRST)
    assert loop.with_date(config, tmp_path).model.template_date == FIRST
    content = {"config": json.loads(json.dumps(loop.dataclasses.asdict(config.with_date(FIRST)))), "digest": ""}
    content["config"]["decode"]["members_at_once"] = members_at_once
    (tmp_path / "config.json").write_text(json.dumps(content))
    on(SECOND)
    assert loop.with_date(config, tmp_path).model.template_date == FIRST
    other = config_of(model, FIELDS, es={"population": 4})
    assert loop.with_date(other, tmp_path).model.template_date == SECOND
    assert loop.with_date(config.with_date("2020-02-29"), tmp_path).model.template_date == "2020-02-29"


def test_all_processes_take_the_day_of_the_first(tmp_path, on, monkeypatch):
    told = []
    monkeypatch.setattr(processes, "exchange", lambda own: told.append(own) or {0: FIRST})
    on(SECOND)
    for first in (True, False):
        monkeypatch.setattr(processes, "first", lambda first=first: first)
        assert loop.with_date(freeze({}), tmp_path).model.template_date == FIRST
    assert told == [{0: SECOND}, {}]


def test_runs_of_two_days_are_one_series_whose_prompts_differ(model, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, date, seed in zip(folders, (FIRST, SECOND), (0, 1), strict=True):
        train = {"steps": 1, "checkpoint_every": 1, "seed": seed}
        run(config_of(model, FIELDS | {"train": train}, model={"template_date": date}), folder)
    runs = [read_run(folder) for folder in folders]
    (series,) = group(runs)
    assert [one.folder for one in series.runs] == folders
    (reason,) = incomparable(runs).values()
    assert "digest of the rows" in reason and reason.endswith(
        f"(model.template_date is {SECOND!r}, and {FIRST!r} there)"
    )


@pytest.mark.parametrize("date", ["tomorrow", "27.11.2026", "2026-13-01", "2026-02-30", "20261127", "2026-W48-5", ""])
def test_what_is_no_day_is_refused(date):
    with pytest.raises(ValueError, match=rf"model\.template_date is {date!r}: it must be a day such as 2026-11-27"):
        freeze({"model": {"template_date": date}})
    with pytest.raises(ValueError, match=rf"template_date is {date!r}: it must be a day such as 2026-11-27"):
        Options(template_date=date)


def test_a_prompt_of_the_run_is_a_prompt_of_its_date(model):
    tokenizer = load_outline(Path(model)).tokenizer
    set_date(tokenizer, FIRST)
    assert render(tokenizer, [{"role": "user", "content": "a"}]).startswith("Today Date: 27 Nov 2026 00:00:00\n")
