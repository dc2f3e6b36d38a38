"""The planner, on the smallest TPU slices: what it says of a run, and what it says when the run does not fit."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from es_jax.core.chips import chip
from es_jax.core.mesh import make_mesh
from es_jax.models.config import TransformerConfig
from es_jax.planning.plan import candidates, compile_program, fields, make_plan, words
from es_jax.planning.programs import Bytes, find_shape, programs_of
from es_jax.planning.topology import Topology, topology
from es_jax.training.config import freeze

ROOT = Path(__file__).resolve().parents[2]
SMALL = TransformerConfig(
    family="qwen2", vocab_size=512, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=256, qkv_bias=True
)
CONFIG = {
    "model": {"source": "small"},
    "task": {"train_size": 8},  # as many as slots, so that decoding is one prefill and one chunk
    "es": {"population": 8},
    "decode": {"max_prompt_tokens": 32, "max_new_tokens": 8, "slots": 8},
    "optim": {"anchor": {"penalty": "l2", "strength": 10.0}},
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[plan]'"
)


@pytest.fixture(scope="module")
def plan():
    return make_plan(freeze(CONFIG), SMALL, topology("v5e:2x2"))


@needs_libtpu
def test_a_small_run_fits_four_chips(plan):
    said = fields(plan)
    assert said["fits"] and json.loads(json.dumps(said)) == said
    assert list(said["programs"]) == ["load", "perturb", "decode", "update"]
    assert said["programs"]["perturb"]["runs"] == 2 and said["programs"]["decode"]["runs"] == 2
    for program in said["programs"].values():
        assert program["compile_seconds"] > 0 and program["error"] is None
        assert sum(program["parts"].values()) == program["peak_bytes"] >= program["own_bytes"] > 0
    assert "fits" in words(plan).splitlines()[-1] and "bound, not a measurement" in words(plan)


@needs_libtpu
def test_members_are_decoded_apart_and_the_update_is_local(plan):
    """Nothing goes between groups while they decode, and an update exchanges no weights."""
    sent = {outcome.name: outcome.collectives for outcome in plan.programs}
    assert not [kind for kind in sent["decode"] if "groups" in kind.axes]
    assert sum(kind.bytes * kind.times for kind in sent["update"]) < 1000
    assert any(kind.op == "all-gather" for kind in sent["perturb"])


@needs_libtpu
def test_a_chip_that_is_too_small_is_told_with_what_would_help(plan):
    tiny = dataclasses.replace(plan.topology, chip=dataclasses.replace(plan.topology.chip, memory=10_000))
    short = dataclasses.replace(plan, topology=tiny)
    assert not short.fits and short.short > 0
    assert fields(short)["verdict"].startswith("does not fit") and "pinned_host" in words(short)


@needs_libtpu
def test_a_pinned_anchor_is_the_hosts_and_not_the_devices(plan):
    """The compiler counts it in its peak; the plan does not."""
    pinned = CONFIG | {"optim": {"anchor": {"penalty": "l2", "strength": 10.0, "memory": "pinned_host"}}}
    load = next(iter(programs_of(freeze(pinned), SMALL, plan.topology)))
    outcome = compile_program(load, plan.mesh)[0]
    on_device = plan.programs[0]
    assert outcome.host_bytes == on_device.parts["anchor"] and on_device.host_bytes == 0
    assert outcome.peak_bytes < on_device.peak_bytes - 0.9 * outcome.host_bytes


@needs_libtpu
def test_grpo_is_planned_too(plan):
    """Its rollouts lower, its update compiles and holds the gradient and AdamW's moments beside the weights."""
    grpo = CONFIG | {"method": "grpo", "grpo": {"rollouts": 2, "mini_batch": 8}, "optim": {"name": "adamw"}}
    programs = {program.name: program for program in programs_of(freeze(grpo), SMALL, plan.topology)}
    assert list(programs) == ["load", "rollout", "score", "update"]
    assert (programs["rollout"].times, programs["update"].times) == (1, 1)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to a whole number
        programs["rollout"].lower()
        outcome = compile_program(programs["update"], plan.mesh)[0]
    assert outcome.parts["moments"] >= 2 * outcome.parts["gradient"] == 2 * outcome.parts["parameters"]
    assert outcome.work.flops > 3 * programs["score"].work.flops / 2 and outcome.collectives


@needs_libtpu
@pytest.mark.parametrize("model", [1, 2, 4])
def test_groups_are_neighbours_also_where_an_axis_of_the_slice_is_cut(model):
    """A group of 2 on a slice of 4 × 4 takes half a row of it."""
    groups = make_mesh(None, model, devices=list(topology("v6e:4x4").devices)).devices
    assert groups.shape == (16 // model, model)
    for group in groups:
        places = np.array([device.coords for device in group])
        assert np.ptp(places, axis=0).sum() == model - 1


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e", "v5e:3x5x7x2", "v5e:1x1", "nothing:2x2"])
def test_topologies_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match=r"v5e|chip"):
        topology(name)


def test_parts_of_what_a_device_holds():
    """Counted on the eight CPU devices: masters and anchor over all of them, a member's copy in each group."""
    cpu = Topology("cpu:8", chip("v5e"), tuple(jax.devices()))
    programs = programs_of(freeze(CONFIG), SMALL, cpu)
    held = programs.decode().parts
    weights = 2 * 128 * (2 * 128 + 2 * 2 * 32 + 3 * 256) + 512 * 128
    assert held["parameters"] == held["anchor"]
    assert 0 < held["parameters"].device / (4 * weights / 8) - 1 < 0.1  # small leaves are whole
    assert held["compute copy"].device >= 2 * weights
    assert held["KV cache"] == Bytes(2 * 2 * 8 * (32 + 7) * 2 * 32 * 2)  # one prefill of 32 and one chunk of 7 steps


def test_the_search_ranks_meshes_and_slots():
    cpu = Topology("cpu:8", chip("v5e"), tuple(jax.devices()[:1]))
    found = candidates(freeze(CONFIG), SMALL, cpu)
    assert [one.config.decode.slots for one in found] == [8, 4, 2, 1]
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(found))


def test_shapes_come_from_files_and_then_from_the_table(tiny_model):
    of = lambda source: freeze({"model": {"source": str(source)}})  # noqa: E731
    assert find_shape(of(tiny_model))[1] == "files"
    shape, origin = find_shape(of("Qwen/Qwen2.5-7B-Instruct"))
    assert (shape.layers, origin) == (28, "published")
    with pytest.raises(FileNotFoundError, match=r"Qwen2\.5-7B"):
        find_shape(of("Qwen/Qwen2.5-9B"))
    with pytest.raises(ValueError, match=r"model\.source is empty"):
        find_shape(of(""))


def test_a_mistake_ends_the_command_with_a_sentence():
    command = [sys.executable, "-m", "es_jax.plan", "--config=configs/countdown.py", "--topology=v5f:4x4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "'v5e'" in done.stderr and "Traceback" not in done.stderr
