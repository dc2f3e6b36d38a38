"""The planner, on the smallest TPU slices: what it says of a run, and what it says when the run does not fit."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from es_jax.core.chips import chip
from es_jax.core.mesh import make_mesh
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import matrix_weights
from es_jax.planning.costs import Work, pair_numbers
from es_jax.planning.plan import Moved, candidates, compile_program, fields, make_plan, plan_here, words
from es_jax.planning.programs import Bytes, find_shape, programs_of
from es_jax.planning.topology import Topology, topology
from es_jax.planning.traffic import Traffic
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
needs_cuda = pytest.mark.skipif(
    shutil.which("ptxas") is None
    or importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason="the compiler for GPUs is not installed: see python -m es_jax.plan --help, and ptxas on the PATH",
)

pytestmark = pytest.mark.unchecked  # the planner puts descriptions where arrays stand


@functools.cache
def small_plan():
    return make_plan(freeze(CONFIG), SMALL, topology("v5e:2x2"))


@pytest.fixture
def plan(annotations):
    return small_plan()


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
def test_many_slots_have_an_answer_of_the_compiler(annotations):
    """libtpu 0.0.42 ended without one, where a chunk of all 64 slots gave them back through a scatter."""
    decode = {"max_prompt_tokens": 32, "max_new_tokens": 64, "slots": 64}
    config = freeze(CONFIG | {"task": {"train_size": 128}, "decode": decode})
    plan = make_plan(config, SMALL, topology("v5e:2x2"), only={"perturb", "decode"})
    assert {program.name: program.error for program in plan.programs} == {"perturb": None, "decode": None}


@needs_libtpu
def test_what_programs_move_is_told(plan):
    """This model stays in the fast memory of the chips, so that a step may move less than it would have to."""
    said, lines = fields(plan)["programs"], words(plan)
    for name, prefix in (("perturb", ""), ("update", ""), ("decode", "step_"), ("decode", "prefill_")):
        moved, least, ratio, kernels = (
            said[name][prefix + field] for field in ("bytes", "bytes_least", "ratio", "kernels")
        )
        assert moved > 0 and least > 0 and kernels > 0 and np.isclose(ratio, moved / least, rtol=1e-3)
        assert said[name][prefix + "unknown_calls"] == []
    assert said["perturb"]["ratio"] >= 1 and "bytes" not in said["decode"] | said["load"]
    assert "decode, a step of all slots at all places: " in lines and "update: " in lines


@needs_cuda
def test_a_gpu_decodes_in_place_and_makes_layers_one_by_one():
    """What the compiler hides, the kernels, is counted at the lengths that the slots have."""
    said = fields(make_plan(freeze(CONFIG), SMALL, topology("h100:1x1x1")))["programs"]
    assert list(said) == ["load", "perturb", "perturb_layer", "decode", "update"]
    assert said["perturb_layer"]["runs"] == SMALL.layers * said["perturb"]["runs"]
    decode = said["decode"]
    assert decode["step_unknown_calls"] == [] and "chunk_bytes" not in decode
    assert decode["even_step_bytes"] <= decode["step_bytes"] and decode["even_step_kernels"] == decode["step_kernels"]
    assert decode["even_step_bytes_least"] < decode["step_bytes_least"]


@needs_cuda
def test_absent_gpus_have_no_pinned_memory():
    pinned = CONFIG | {"optim": {"anchor": {"penalty": "l2", "strength": 10.0, "memory": "pinned_host"}}}
    with pytest.raises(ValueError, match=r"optim\.anchor\.memory is 'pinned_host', which JAX does not know of GPUs"):
        programs_of(freeze(pinned), SMALL, topology("h100:1x1x1"))


@needs_libtpu
def test_a_program_with_an_unknown_call_has_no_figure(plan):
    decode = plan.programs[2]
    moved = {"step": Moved(Traffic(5e9, 3, frozenset({"nobody_knows"})), 2e9), "prefill": Moved(None, 3e9)}
    unknown = dataclasses.replace(plan, programs=(decode._replace(moved=moved),))
    said = fields(unknown)["programs"]["decode"]
    assert said["step_bytes"] is None and said["step_ratio"] is None and said["step_unknown_calls"] == ["nobody_knows"]
    assert said["step_bytes_least"] == 2e9 and said["prefill_bytes"] is None and said["prefill_kernels"] is None
    assert "not known, for it calls nobody_knows; 2 GB at least" in words(unknown)


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


@pytest.mark.parametrize(("arguments", "says"), [
    (["--config=configs/countdown.py", "--topology=v5f:4x4"], "'v5e'"),
    (["--topology=v5e:2x2"], "--config is missing: give it"),
    (["--config=lap", "--topology=v5e:2x2"], "did you mean 'lab'"),
    (["--config=lab", "--topology=v5e:2x2", "more"], "unexpected arguments ['more']"),
])  # fmt: skip
def test_a_mistake_ends_the_command_with_a_sentence(arguments, says):
    command = [sys.executable, "-m", "es_jax.plan", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


LOW_RANK = CONFIG | {
    "es": {"noise": "low_rank", "population": 16, "prompts_per_member": 4},
    "decode": CONFIG["decode"] | {"members_at_once": 4},
}


def on_cpu(config, devices=1, memory=None, slots=4):
    """The programs of a run on CPU devices of so much memory, at that many slots."""
    one = chip("v5e") if memory is None else dataclasses.replace(chip("v5e"), memory=memory)
    config = config | {"decode": config["decode"] | {"slots": slots}}
    return programs_of(freeze(config), SMALL, Topology("cpu", one, tuple(jax.devices()[:devices])))


def at_once(config, number):
    return config | {"decode": config["decode"] | {"members_at_once": number}}


def test_parts_and_runs_of_members_that_share_their_weights():
    """One copy in bfloat16, cut over `model` alone, and what the cast took from the embedding; of each member of a
    round [D, 1] and [F, 1] of every matrix, in float32, and vectors in bfloat16, whole on every device of its group."""
    programs = on_cpu(LOW_RANK | {"mesh": {"groups": 2, "model": 2}}, devices=4)
    by_name = {program.name: program for program in programs}
    assert [*by_name] == ["load", "share", "perturb", "decode", "update"]
    assert [program.times for program in by_name.values()] == [0, 1, 2, 2, 1]
    kernels = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256  # of a layer: q and o, k and v, the MLP
    vectors = 2 * (2 * 128 + 128 + 2 * 64) + 128  # norms and biases of two layers, the final norm
    held = by_name["decode"].parts
    assert held["compute copy"] == Bytes(2 * (2 * kernels + 2 * 512 * 128 + vectors) // 2)
    pairs = 2 * (2 * 256 + 2 * 192 + 3 * 384) + 512 + 128
    assert held["pairs"] == held["other round"] == Bytes(4 * (4 * pairs + 2 * vectors))
    assert held["KV cache"] == Bytes(4 * 2 * 2 * 4 * (32 + 7) * 2 * 32 * 2 // 2)  # 4 members × 4 slots, a half of them
    assert "other round" not in on_cpu(at_once(LOW_RANK, 16)).decode().parts
    assert "pairs" not in by_name["share"].parts and by_name["share"].parts["compute copy"] == held["compute copy"]


LAYER = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128 + 128 + 2 * 64  # kernels, norms, biases
TABLE, KV = 512 * 128, 2 * 2 * 2 * 32 * 2  # the embedding; bytes of a token's keys and values


@pytest.mark.parametrize(("change", "slots", "weights", "rows"), [
    ({}, 8, 2 * LAYER + TABLE + 128, 8),  # one prefill
    ({}, 4, 2 * LAYER + TABLE + 128, 1),  # prefills of a quarter of the slots
    ({"tied_embeddings": False}, 4, 2 * LAYER + TABLE + 128, 1),  # a table is only looked up where the head is another
    ({"layers": 3}, 2, 3 * LAYER + TABLE + 128, 1),
])  # fmt: skip
def test_what_a_step_and_a_prefill_must_move(change, slots, weights, rows):
    """A row has 32 + 7 places at its end; one more token is written in a step, a prompt of 32 in a prefill."""
    model, cpu = dataclasses.replace(SMALL, **change), Topology("cpu", chip("v5e"), tuple(jax.devices()[:1]))
    config = freeze(CONFIG | {"decode": CONFIG["decode"] | {"slots": slots}})
    token = KV * model.layers // 2
    counted = programs_of(config, model, cpu).decode().counted
    assert counted["step"].least == 2 * weights + slots * (39 + 1) * token
    assert counted["prefill"].least == 2 * weights + rows * 32 * token
    chunk = {name: part.least for name, part in counted.items() if name == "chunk"}
    assert chunk == ({} if slots == 8 else {"chunk": 2 * slots * 7 * token})


def test_what_a_step_of_members_that_share_their_weights_must_move():
    """The copy once, and of each of four members its pairs and caches; on half of the devices half of it."""
    one = on_cpu(LOW_RANK)
    pairs, caches = one.decode().parts["pairs"].device, 4 * 4 * (39 + 1) * KV
    weights = 2 * (2 * LAYER + TABLE + 128)
    assert one.decode().counted["step"].least == weights + pairs + caches
    halves = on_cpu(LOW_RANK | {"mesh": {"groups": 1, "model": 2}}, devices=2)
    assert halves.decode().counted["step"].least == (weights + caches) / 2 + pairs
    own = on_cpu(at_once(LOW_RANK | {"es": LOW_RANK["es"] | {"noise": "gaussian"}}, 4))
    assert own.decode().counted["step"].least == own.evaluator.at_once * weights + own.evaluator.at_once * caches / 4


@pytest.mark.parametrize(("optim", "reads_and_writes", "reads"), [
    ({"anchor": {"penalty": "l2", "strength": 10.0}}, ["parameters"], ["parameters"]),  # a fixed anchor
    ({"anchor": {"penalty": "l2", "strength": 10.0, "ema_decay": 0.9}}, ["parameters"] * 2, ["parameters"]),  # θ₀ too
    ({"anchor": {"penalty": "l2", "strength": 10.0, "memory": "pinned_host"}}, ["parameters"], []),
    ({"name": "adamw", "anchor": {"penalty": "none"}}, ["parameters"] * 3, ["parameters"]),
])  # fmt: skip
def test_what_an_update_must_move(optim, reads_and_writes, reads):
    programs = on_cpu(CONFIG | {"optim": optim})
    least = sum(2 * programs.resident[name].device for name in reads_and_writes)
    least += sum(programs.resident[name].device for name in reads)
    assert abs(programs.update().counted[""].least - least) < 100  # and the numbers of steps
    copy = programs.copy["compute copy"].device
    assert programs.perturb().counted[""].least == programs.resident["parameters"].device + copy


def peak(programs):
    """Of `decode`, as XLA's own compiler for CPUs has it."""
    stats = programs.decode().lower().compile().memory_analysis()
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes


def test_the_peak_of_decoding_grows_by_pairs_and_caches_and_not_by_copies():
    config = LOW_RANK | {"es": {"noise": "low_rank", "population": 32, "prompts_per_member": 1}}
    few, many = (on_cpu(at_once(config, number)) for number in (2, 16))
    copy, more = (few.decode().parts[name].device for name in ("compute copy", "pairs"))
    cache = few.decode().parts["KV cache"].device
    grown = peak(many) - peak(few)
    assert grown > 7 * (more + cache)
    assert grown < 7 * (more + cache) + 7 * copy  # fourteen copies more, if each member had one


@pytest.mark.parametrize(
    ("noise", "each", "slots", "used"),
    [("gaussian", None, 64, 8), ("gaussian", 4, 64, 4), ("low_rank", None, 4, 4), ("low_rank", 1, 64, 1)],
)
def test_members_decode_the_prompts_that_they_see(noise, each, slots, used):
    """As many as es.prompts_per_member says, whatever the noise, and no more slots than those."""
    config = LOW_RANK | {"es": {"noise": noise, "population": 32, "prompts_per_member": each}}
    programs = on_cpu(at_once(config, 2), slots=slots)
    _, prompts, _ = programs.decode().lower().args_info[0]
    tokens = prompts.tokens
    assert tokens.shape[:2] == (2, each or 8) and programs.evaluator.engine.slots == used


def test_a_step_reads_shared_weights_once():
    """Eight members read the copy once, and each its pairs and cache; of copies of their own they read eight."""

    def work(noise, number):
        return on_cpu(at_once(LOW_RANK | {"es": LOW_RANK["es"] | {"noise": noise}}, number)).decode().work

    own, one, eight = work("gaussian", 1), work("low_rank", 1), work("low_rank", 8)
    copy, pairs = 2 * sum(matrix_weights(SMALL)), 4 * sum(pair_numbers(SMALL))
    # eight steps of one member, and one more of each of eight, whose prefill takes two passes
    assert work("gaussian", 8) == Work(8 * own.flops, 8 * (own.memory + copy))
    assert eight.memory == 9 * copy + 8 * (one.memory - 8 * copy + pairs)
    assert one.memory == own.memory + 8 * pairs
    assert eight.flops == 8 * one.flops > 8 * own.flops


@pytest.mark.parametrize(("noise", "memory", "expected"), [
    ("gaussian", 2**34, 1), ("low_rank", 2**34, 16), ("low_rank", 10 * 2**20, 8), ("low_rank", 2**20, 1)
])  # fmt: skip
def test_members_at_once_are_chosen_from_the_memory_planned_for(noise, memory, expected):
    config = at_once(LOW_RANK | {"es": {"noise": noise, "population": 16}}, None)
    programs = on_cpu(config, memory=memory)
    assert programs.config.decode.members_at_once == programs.evaluator.at_once == expected


def test_the_search_tries_members_at_once_where_they_share_weights():
    cpu = Topology("cpu:1", chip("v5e"), tuple(jax.devices()[:1]))
    found = [one.config.decode for one in candidates(freeze(LOW_RANK), SMALL, cpu)]
    assert {(one.members_at_once, one.slots) for one in found} == set(itertools.product((1, 2, 4, 8, 16), (1, 2, 4)))
    assert (found[0].members_at_once, found[0].slots) == (16, 4)
    own = LOW_RANK | {"es": LOW_RANK["es"] | {"noise": "gaussian"}}
    assert {one.config.decode.members_at_once for one in candidates(freeze(own), SMALL, cpu)} == {4}


@needs_libtpu
def test_a_plan_of_shared_weights_says_how_many_decode_at_once(annotations):
    """What is compiled, `--json` and the words; and where a chip is too small, how many fewer would fit."""
    config, compiled = freeze(LOW_RANK | {"mesh": {"groups": 4}}), {}
    plan = plan_here(config, SMALL, topology("v5e:2x2"), compiled=compiled)
    said = fields(plan)
    assert said["fits"] and said["members_at_once"] == 4 and ("decode", 4, 1, 4, 4) in compiled
    assert [program["runs"] for program in said["programs"].values()] == [0, 1, 1, 1, 1]
    assert "4 slots, 4 members at once, 4 of 8 prompts each" in words(plan)
    for program in said["programs"].values():
        assert sum(program["parts"].values()) == program["peak_bytes"] >= program["own_bytes"]
    decode = plan.programs[3]
    memory = decode.peak_bytes - (decode.parts["pairs"] + decode.parts["KV cache"]) // 4
    small = dataclasses.replace(plan.topology, chip=dataclasses.replace(plan.topology.chip, memory=memory))
    assert "decode.members_at_once=2 frees about" in words(dataclasses.replace(plan, topology=small))
