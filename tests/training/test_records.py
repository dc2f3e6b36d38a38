"""What a run tells while it runs: a tracker, a callback, lines and a bar; and that none of them changes a step."""

import dataclasses
import importlib.machinery
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers.utils import logging as transformers_logging

from es_jax import StepRecord
from es_jax.core import processes
from es_jax.core.extras import require, without_advice
from es_jax.core.flags import arguments_of
from es_jax.rundir import metrics
from es_jax.rundir.metrics import Progress, how_to_look, read_jsonl, say
from es_jax.rundir.tracker import Tracker
from es_jax.training import loop
from es_jax.training.config import freeze
from es_jax.training.loop import run
from tests.helpers import SMALL_RUN, TWO_STEPS, config_of, same

ROOT = Path(__file__).resolve().parents[2]
MOVES = TWO_STEPS | {name: SMALL_RUN[name] for name in ("es", "optim", "decode")}  # its members differ in reward
TRACKED = MOVES | {"train": TWO_STEPS["train"] | {"tracker": "wandb"}, "evals": {"every": 2, "rows": 2}}


class Wandb(types.ModuleType):
    """Stands in for wandb: keeps what it is told, and fails where it is asked to."""

    def __init__(self, fail=""):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.fail, self.starts, self.rows, self.ends, self.config = fail, [], [], [], self
        self.fields: dict = {}

    def _do(self, what):
        if what == self.fail:
            raise RuntimeError(f"no {what}\ntoday")

    def init(self, **options):
        self._do("init")
        self.starts.append(options)
        self.id = options["id"]
        return self

    def define_metric(self, *names, **options):
        self._do("define_metric")

    def update(self, fields, allow_val_change=False):
        self._do("update")
        assert allow_val_change
        self.fields = fields

    def log(self, row):
        self._do(f"log of step {row['step']}")
        self.rows.append(row)

    def finish(self, exit_code):
        self._do("finish")
        self.ends.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """A function that puts a stand-in in the place of wandb."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    require.cache_clear()

    def stand_in(fail=""):
        module = Wandb(fail)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    yield stand_in
    require.cache_clear()


def test_a_tracked_run_has_fields_rows_and_held_out_rows_and_goes_on_in_the_same_one(tiny_model, tmp_path, wandb):
    module = wandb()
    run(config_of(tiny_model, TRACKED), tmp_path)
    (start,), number = module.starts, json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    assert start["id"] == number and start["resume"] == "allow" and start["project"] == "es_jax"
    assert (start["dir"], start["name"]) == (str(tmp_path), tmp_path.name)
    assert module.fields["es"]["sigma"] == 0.05 and module.fields["decode"]["slots"] == 2 and module.ends == [0]
    assert [row["step"] for row in module.rows] == [0, 1, 2]  # the first is the evaluation of the base model
    on_disk, heldout = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(tmp_path / "evals/conciseness.jsonl")
    for told, row in zip(module.rows[1:], on_disk, strict=True):
        assert told["train/reward_mean"] == row["reward_mean"] and told["train/drift"] == row["drift"]
    for told, row in zip((module.rows[0], module.rows[2]), heldout, strict=True):
        assert told["evals/conciseness/reward"] == row["reward"] and "evals/conciseness/n" in told
    assert not [name for row in module.rows for name, x in row.items() if not isinstance(x, int | float)]
    again = wandb()
    run(config_of(tiny_model, TRACKED, train={"steps": 3}), tmp_path)
    assert again.starts[0]["id"] == number and [row["step"] for row in again.rows] == [3]
    assert again.fields["train"]["steps"] == 3


@pytest.mark.parametrize("fail", ["log of step 0", "log of step 2", "update", "finish"])
def test_a_tracker_that_fails_later_loses_no_step(fail, tiny_model, tmp_path, wandb, caplog):
    module = wandb(fail)
    result = run(config_of(tiny_model, TRACKED), tmp_path / "tracked")
    assert result.step == 2 and (tmp_path / "tracked/DONE").exists()
    told = [record.message for record in caplog.records if "train.tracker" in record.message]
    assert len(told) == 1 and f"(no {fail} today): the run goes on without it" in told[0]
    assert len(module.rows) == {"log of step 0": 0, "log of step 2": 2, "update": 0, "finish": 3}[fail]
    alone = run(config_of(tiny_model, TRACKED, train={"tracker": None}), tmp_path / "alone")
    assert same(result.params, alone.params)
    assert (tmp_path / "tracked/seedlog.jsonl").read_bytes() == (tmp_path / "alone/seedlog.jsonl").read_bytes()


@pytest.mark.parametrize("fail", ["init", "define_metric"])
def test_a_tracker_that_does_not_start_ends_the_run_before_any_work(fail, tmp_path, wandb):
    wandb(fail)
    says = rf"train\.tracker is 'wandb', which did not start \(no {fail} today\): run `wandb login`"
    with pytest.raises(ValueError, match=says):
        run(config_of(tmp_path / "no model is here", TRACKED), tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists() and not (tmp_path / "run/tracker.json").exists()


def test_a_run_that_ends_early_is_not_told_as_finished(tiny_model, tmp_path, wandb):
    module = wandb()

    def stop(record):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        run(config_of(tiny_model, TRACKED), tmp_path, callback=stop)
    assert module.ends == [1] and [row["step"] for row in module.rows] == [0, 1]


def test_a_run_that_is_stopped_in_an_evaluation_has_told_its_step(tiny_model, tmp_path, wandb, monkeypatch):
    module, calls, evaluate = wandb(), [], loop.evaluate

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise processes.Preempted
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", stopped)
    with pytest.raises(processes.Preempted, match="step 2 is saved"):
        run(config_of(tiny_model, TRACKED), tmp_path)
    assert [row["step"] for row in module.rows] == [0, 1, 2] and "train/reward_mean" in module.rows[2]


def test_what_is_wrong_with_a_tracker_is_named(tmp_path, wandb, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown train\.tracker 'wandbb': did you mean 'wandb'\?"):
        freeze({"train": {"tracker": "wandbb"}})
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
        with pytest.raises(ImportError, match=r"pip install 'es_jax\[wandb\]'"):
            Tracker("wandb", tmp_path)
    wandb()
    (tmp_path / "tracker.json").write_text('{"wandb"')
    with pytest.raises(ValueError, match=r"tracker\.json is damaged .* delete it for a new run of wandb"):
        Tracker("wandb", tmp_path)


def test_of_several_processes_the_first_one_tracks(tmp_path, wandb, monkeypatch):
    module = wandb()
    monkeypatch.setattr(processes, "first", lambda: False)
    with Tracker("wandb", tmp_path) as tracker:
        tracker.config({"es": {}})
        tracker.write(1, {"train": {"reward_mean": 1.0}})
    assert not module.starts and not module.rows and not list(tmp_path.iterdir())


OFFLINE = """
import json, pathlib, sys
from es_jax.rundir.tracker import Tracker
folder = pathlib.Path(sys.argv[1])
for step in (1, 2):
    with Tracker("wandb", folder) as tracker:
        tracker.config({"es": {"sigma": 0.25}, "train": {"profile": ()}})
        row = {"step": step, "reward_mean": 0.5, "kappa": None}
        tracker.write(step, {"train": row, "evals/toy": {"accuracy": 1.0}})
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install '.[wandb]'")
def test_wandb_itself_keeps_a_run_offline(tmp_path):
    """Two parts of one run, as a resumed run has them: `wandb sync` joins what has one id."""
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        assert b"train/reward_mean" in content and b"evals/toy/accuracy" in content and b'"sigma":0.25' in content
        assert b"kappa" not in content


def test_a_callback_is_told_of_every_step_that_is_finished(tiny_model, tmp_path):
    told, weights = [], []

    def callback(record):
        assert len(read_jsonl(tmp_path / "seedlog.jsonl")) == record.step  # it is on disk
        told.append(record)
        weights.append(jax.device_get(record.params))

    result = run(config_of(tiny_model, MOVES, evals={"every": 2, "rows": 2}), tmp_path, callback=callback)
    assert [record.step for record in told] == [1, 2] and isinstance(told[0], StepRecord)
    assert [record.metrics for record in told] == read_jsonl(tmp_path / "metrics.jsonl")
    assert told[0].heldout == {} and told[1].heldout["conciseness"]["reward"] == result.heldout["reward"]
    assert same(weights[1], result.params) and not same(weights[0], weights[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        told[0].step = 5
    assert "params" not in repr(told[0])
    run(config_of(tiny_model, MOVES, train={"steps": 3}, evals={"every": 2, "rows": 2}), tmp_path, callback=callback)
    assert [record.step for record in told] == [1, 2, 3]  # of those that this call finished


def test_a_callback_that_raises_stops_the_run_and_finished_steps_stay(tiny_model, tmp_path):
    config = config_of(tiny_model, MOVES)
    whole = run(config, tmp_path / "whole")

    def callback(record):
        if record.step == 1:
            raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        run(config, tmp_path / "run", callback=callback)
    assert len(read_jsonl(tmp_path / "run/seedlog.jsonl")) == 1
    assert same(run(config, tmp_path / "run", callback=callback).params, whole.params)
    assert (tmp_path / "run/seedlog.jsonl").read_bytes() == (tmp_path / "whole/seedlog.jsonl").read_bytes()


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/records.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "docs/records.md", "exec"), {})  # our own text, not a model's
    *steps, end = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in steps] == ["1", "2"] and end == "the finished steps are in runs/watched"
    assert len(read_jsonl(tmp_path / "runs/watched/seedlog.jsonl")) == 2


class Screen(io.StringIO):
    """Standard error, as a terminal or as a file."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def show(monkeypatch):
    """Shows two steps of ten members after one that took 1000 s: what stands on the screen."""

    def on(terminal, *, seconds=5.0):
        screen, now = Screen(terminal), [0.0]
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
        progress = Progress(steps=101, done=0, unit=("member", 10))
        row = {"reward_mean": 0.5, "reward_std": 0.1, "tokens_per_second": 9.0, "drift": 1.0, "drift_theory": None}
        for step in (1, 2, 3):
            for _ in range(10):
                now[0] += 100 if step == 1 else seconds
                progress.advance(1)
            first = {"seconds_to_first_step": 1000.0} if step == 1 else {}
            progress.step({"step": step, "seconds": 10 * seconds, **row, **first})
        progress.close()
        return screen.getvalue()

    return on


def test_a_log_file_has_plain_lines_with_times(show):
    text = show(False)
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    steps = [line for line in lines if "tokens/s" in line]
    assert "ETA" not in steps[0]  # nothing but the compilation is known
    assert "step 2/101" in steps[1] and steps[1].endswith("ETA 1:22:30")  # 99 steps of 50 s
    assert steps[2].endswith("ETA 1:21:40")
    parts = [line for line in lines if " of 10 members" in line]
    assert parts and "step 1/101  1 of 10 members" in parts[0] and "ETA" not in parts[0]


def test_a_long_step_is_told_once_a_minute(show):
    lines = [line[20:] for line in show(False, seconds=25.0).splitlines()]
    parts = [line for line in lines if line.startswith("step 2/101  ") and " of 10 members" in line]
    times = (3, "6:55:25"), (6, "6:54:10"), (9, "6:52:55")  # of 1000 members of 25 s
    assert parts == [f"step 2/101  {n} of 10 members  ETA {eta}" for n, eta in times]


def test_a_terminal_has_one_bar_and_one_eta(show):
    text = show(True)
    assert len(re.findall(r"\rstep \d/101  reward [^\r]* s/step\n", text)) == 3
    bars = [part for part in re.split(r"[\r\n]", text) if "members [" in part]
    assert bars and not [bar for bar in bars if bar.count("ETA") > 1]
    last = [bar for bar in bars if "30/1010 members" in bar][-1]
    assert "ETA 1:21:40]" in last and "ETA" not in bars[0]


def test_how_to_look_is_a_command_that_is_there(monkeypatch, capsys):
    find = importlib.util.find_spec
    for there, says in ((object(), "curves: tensorboard --logdir 'a run/tb'"), (None, "'es_jax[tensorboard]', then")):
        one = {"tensorboard": there}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, one=one: one[name] if name in one else find(name))
        assert says in how_to_look(Path("a run/tb"))
    say("a line")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d a line\n", capsys.readouterr().err)


@pytest.mark.parametrize(("arguments", "read"), [
    (["-v"], ["-v=1"]),
    (["-v", "--workdir=x"], ["-v=1", "--workdir=x"]),
    (["-v", "-1"], ["-v", "-1"]),
    (["-v", "1", "--json"], ["-v", "1", "--json"]),
    (["-v=0", "--verbosity=1"], ["-v=0", "--verbosity=1"]),
])  # fmt: skip
def test_v_alone_is_verbosity_one(arguments, read):
    assert arguments_of(["command", *arguments]) == read


def test_transformers_gives_no_advice_while_it_is_imported(monkeypatch, caplog):
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    logger = transformers_logging.get_logger("transformers.advice")
    logger.addHandler(caplog.handler)
    for before in (None, "1", "0"):
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        with without_advice():
            assert os.environ[name] == (before or "1")
            if before is None:
                logger.warning_advice("install something")
        assert os.environ.get(name) == before
    logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_the_command_says_no_more_than_it_should(tiny_model, tmp_path):
    """In a file, where PyTorch cannot be found, and with -v: where parameters live, and no line that is not ours."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
    )
    config = tmp_path / "config.py"
    fields = json.loads(json.dumps(config_of(tiny_model, TWO_STEPS, train={"steps": 1}), default=dataclasses.asdict))
    config.write_text(f"def get_config():\n    return {fields!r}\n")
    command = [sys.executable, "-m", "es_jax.train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "-v"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = run(config_of(tiny_model, TWO_STEPS, train={"steps": 1}), tmp_path / "quiet").params
    assert done.stderr.count("is cut as") == len(jax.tree.leaves(weights))
    assert "PyTorch" not in done.stderr and "\r" not in done.stderr
    assert f"tensorboard --logdir {tmp_path / 'run/tb'}" in done.stderr
    times = r"(\d{4}-\d\d-\d\d|[IW]\d{4}) \d\d:\d\d:\d\d"  # ours, and absl's of a logger
    assert all(re.match(times, line) for line in done.stderr.splitlines()), done.stderr


def test_a_finished_run_logs_no_shardings_by_itself(tiny_model, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="es_jax"):
        result = run(config_of(tiny_model, TWO_STEPS, train={"steps": 1}), tmp_path)
    assert "is cut as" not in caplog.text and np.isfinite(result.reward)
