"""What a run chooses by itself: its mesh and its slots, from the memory that the devices report."""

import dataclasses
import json
import types

import jax
import pytest

from es_jax.core import processes
from es_jax.core.chips import chip
from es_jax.evals import runner
from es_jax.generate.engine import Engine
from es_jax.models.config import TransformerConfig
from es_jax.models.known_configs import published
from es_jax.planning.programs import programs_of
from es_jax.planning.topology import Topology
from es_jax.training.config import default_config, freeze
from es_jax.training.loop import run
from es_jax.training.sizes import choose_slots
from tests.helpers import TWO_STEPS, config_of, same

FIELDS = {
    "model": {"dtype": "bfloat16"},
    "task": {"train_size": 200},
    "decode": {"max_prompt_tokens": 256, "max_new_tokens": 1024},
    "optim": {"anchor": {"penalty": "l2", "strength": 10.0}},
}
NONE = TWO_STEPS | {
    "task": {"name": "conciseness", "train_size": 5},
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 2},
    "mesh": {"groups": None, "model": None},
}


def on(groups, model):
    return types.SimpleNamespace(shape={"groups": groups, "model": model}, size=groups * model)


def engine_of(model, config, longest=1):
    """One of a run whose prompts have at most so many tokens."""
    new = config.decode.max_new_tokens
    return Engine(model, slots=1, max_prompt_tokens=longest, max_new_tokens=new, stop_token_ids=())


def slots_of(model, name, groups, cut, **changes):
    fields = {group: FIELDS.get(group, {}) | changes.get(group, {}) for group in {**FIELDS, **changes}}
    engine = engine_of(published(model), freeze(fields))
    return choose_slots(freeze(fields), engine, on(groups, cut), memory=chip(name).memory)[0]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("model", "name", "groups", "cut", "slots"),
    [  # what `plan` finds to fit (docs/scale.md): 100 slots in the first two, and no more than 51 in the third
        ("Qwen/Qwen2.5-7B", "v5e", 4, 4, 100),
        ("Qwen/Qwen2.5-3B", "v5e", 8, 2, 100),
        ("meta-llama/Llama-3.1-8B", "v5e", 4, 4, 40),
        ("Qwen/Qwen2.5-1.5B", "h100", 1, 1, 200),
        ("meta-llama/Llama-3.1-8B", "v5e", 16, 1, 1),  # its weights leave nothing
    ],
)
def test_slots_follow_from_memory(model, name, groups, cut, slots):
    assert slots_of(model, name, groups, cut) == slots


@pytest.mark.unchecked
def test_a_cache_that_steps_write_in_place_is_there_once():
    fields = FIELDS | {"decode": {"max_prompt_tokens": 1024, "max_new_tokens": 8192}}
    config, model = freeze(fields), published("Qwen/Qwen2.5-7B")

    def slots(groups, cut, **fields):
        engine = dataclasses.replace(engine_of(model, config), **fields)
        return choose_slots(config, engine, on(groups, cut), memory=chip("h100").memory)[0]

    beside, in_place = slots(8, 1), slots(8, 1, in_place=True)
    assert 1.5 * beside < in_place < 2.1 * beside
    assert slots(4, 2, in_place=True) == slots(4, 2)  # members that are cut do not decode so


@pytest.mark.unchecked
def test_slots_know_what_else_a_device_holds():
    three = ("Qwen/Qwen2.5-3B", "h100", 1, 1)
    adamw = slots_of(*three, optim={"name": "adamw", "anchor": {"penalty": "none"}})
    longer, lanes = (slots_of(*three, decode=fields) for fields in ({"max_new_tokens": 4096}, {"members_at_once": 2}))
    assert max(adamw, longer, lanes) < slots_of(*three) == 200
    assert slots_of("Qwen/Qwen2.5-0.5B", "h100", 1, 1, task={"prompts_per_step": 9}) == 9


def test_the_smallest_device_counts_and_one_that_reports_nothing(monkeypatch):
    def report(*sizes):
        devices = [types.SimpleNamespace(memory_stats=lambda n=n: n and {"bytes_limit": n}) for n in sizes]
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        return processes.device_memory()

    assert report(70, 80, 75) == 70 and report(70, None) is None and report(None) is None


def test_without_a_report_there_are_64_slots(tiny_model, tmp_path, capsys):
    run(config_of(tiny_model, NONE), tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["config"]["decode"]["slots"] == 64 and facts["mesh"] == {"groups": 8, "model": 1}
    assert facts["config"]["mesh"] == {"groups": None, "model": None}  # as it was asked for
    said = capsys.readouterr().err
    assert "decode.slots: 64, as the devices do not report their memory" in said
    assert "mesh: groups 8 × model 1 of 8 devices: the devices do not report their memory" in said


def test_a_chosen_number_stays_with_the_run(tiny_model, tmp_path, monkeypatch, capsys):
    """Also where another machine would choose another; in an evaluation too."""

    def config(steps, **groups):
        return config_of(tiny_model, NONE, train={"steps": steps}, **groups)

    def report(memory):
        monkeypatch.setattr(processes, "device_memory", lambda: memory)

    report(2_000_000)
    whole = run(config(2), tmp_path / "whole")
    assert "decode.slots: 3 of a member's 5 prompts of 160 and 2 tokens" in capsys.readouterr().err
    run(config(1), tmp_path / "cut")
    began = json.loads((tmp_path / "cut/config.json").read_text())["config"]
    assert began["decode"]["slots"] == 3
    report(10**9)
    resumed = run(config(2), tmp_path / "cut")
    assert "decode.slots: 3, as when the run began" in capsys.readouterr().err
    assert same(whole.params, resumed.params)
    assert json.loads((tmp_path / "cut/config.json").read_text())["config"]["decode"]["slots"] == 3
    used = []
    engine_for = runner.engine_for
    monkeypatch.setattr(runner, "engine_for", lambda *a, **k: used.append(k["slots"]) or engine_for(*a, **k))
    runner.evaluate_run(tmp_path / "cut", steps=[2], out=tmp_path / "out", options=runner.Options(rows=2))
    assert used == [3]


def test_a_run_from_before_keeps_the_slots_that_it_had(tiny_model, tmp_path, monkeypatch):
    """Its config.json has 64 of them, and nothing of a mesh."""
    run(config_of(tiny_model, NONE, train={"steps": 1}), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["sha256"], content["mesh"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(processes, "device_memory", lambda: 2_000_000)
    run(config_of(tiny_model, NONE), tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["config"]["decode"]["slots"] == 64 and facts["mesh"] == {"groups": 8, "model": 1}


@pytest.mark.unchecked
@pytest.mark.parametrize("memory", [2**18, 2**22, 2**30])
def test_a_plan_chooses_as_a_run_does(memory):
    model = TransformerConfig(
        family="qwen2", vocab_size=512, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=256
    )
    config = freeze(FIELDS | {"mesh": {"groups": 1, "model": 1}})
    one = dataclasses.replace(chip("v5e"), memory=memory)
    programs = programs_of(config, model, Topology("cpu", one, tuple(jax.devices()[:1])))
    chosen = choose_slots(config, engine_of(model, config, longest=7), programs.mesh, memory=memory)[0]
    assert programs.evaluator.engine.slots == programs.config.decode.slots == chosen


def test_configs_leave_the_choice_to_the_run():
    assert default_config().decode.slots is None and freeze(default_config()).mesh.model is None
