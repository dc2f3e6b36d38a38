"""The laws of the mesh: every leaf has its place, members fit on several devices, and the bits are the same on all."""

import dataclasses
import hashlib
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from es_jax.core.mesh import GROUPS, MODEL, leaf_spec, make_mesh, only
from es_jax.core.tree import map_named, named_leaves
from es_jax.es.population import Population
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Prompts
from es_jax.models.config import TransformerConfig
from es_jax.models.layers import Transposed
from es_jax.models.sharding import RULES, check_heads, members_spread, param_shardings
from es_jax.models.transformer import Transformer, param_shapes
from es_jax.planning.programs import Programs
from es_jax.rundir.seed_log import Entry
from es_jax.training.es import Evaluator
from es_jax.training.loop import run
from es_jax.training.state import State, choose_mesh, mesh_of, update_on
from es_jax.training.weights_at import replay
from es_jax.weights.model import Model, load_model, save_model
from tests.helpers import config_of, host, same

SMALL = TransformerConfig(
    family="qwen2",
    vocab_size=264,
    width=32,
    layers=2,
    heads=8,
    kv_heads=4,
    head_dim=8,
    mlp_dim=64,
    qkv_bias=True,
)
MESHES = ((8, 1), (4, 2), (2, 4))
COLLECTIVES = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-permute)\S*\(.*")


@pytest.fixture(scope="module")
def qwen(tiny_model, tmp_path_factory):
    """A folder of a small random Qwen2 whose heads, MLP and vocabulary divide over 4 devices."""
    params = jax.tree.map(lambda x: 3 * x, jax.jit(Transformer(SMALL).init)(jax.random.key(0)))
    folder = tmp_path_factory.mktemp("qwen")
    words = load_model(tiny_model).tokenizer
    save_model(folder, Model(SMALL, params, words, digest="", stop_token_ids=(1,)))
    return folder


FIELDS = {
    "task": {"name": "conciseness", "train_size": 3},
    "es": {"population": 6, "sigma": 0.02},
    "optim": {"learning_rate": 0.01, "anchor": {"penalty": "l2", "kappa": 1.0}},
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 6, "slots": 3},
    "train": {"steps": 5, "checkpoint_every": 5, "samples": 1},
    "evals": {"every": 0},
}


def placed(params, mesh):
    return jax.tree.map(jnp.copy, jax.device_put(params, param_shardings(mesh, params)))  # its own, to be donated


def test_runs_on_every_mesh_have_one_seed_log(qwen, tmp_path):
    logs = []
    for groups, model in ((1, 1), *MESHES):
        workdir = tmp_path / f"{groups}x{model}"
        run(config_of(qwen, FIELDS, mesh={"groups": groups, "model": model}), workdir)
        logs.append((workdir / "seedlog.jsonl").read_bytes())
    assert logs[0].count(b"\n") == 5 and len(set(logs)) == 1
    for groups, model in MESHES:
        ((_, alone),) = replay(tmp_path / "1x1", steps=[5], mesh=make_mesh(1))
        ((_, params),) = replay(tmp_path / "1x1", steps=[5], mesh=make_mesh(groups, model))
        assert same(alone, params)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3 * x, jax.jit(Transformer(SMALL).init)(jax.random.key(0)))


def test_every_parameter_has_a_rule_and_the_masters_are_cut_over_all_devices():
    mesh = make_mesh(4, 2)
    full = dataclasses.replace(SMALL, family="gemma2", qk_norm=True, post_norms=True, tied_embeddings=False, width=512)
    for name, shape in param_shapes(full).items():
        spec = leaf_spec(mesh, name, shape, RULES)
        matrix = len(shape) - name.startswith("layers/") == 2
        assert (GROUPS in spec and MODEL in spec) == matrix, (name, spec)


def test_matches_are_told_and_what_does_not_fit_is_named(params, caplog):
    with caplog.at_level(logging.INFO):
        param_shardings(make_mesh(4, 2), params, log=True)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="es_jax"):
        param_shardings(make_mesh(4, 2), params, log=True)
    assert len(caplog.records) == len(jax.tree.leaves(params))
    assert "embed/embedding (264, 32) is sharded as ('model', 'groups')" in caplog.text
    with pytest.raises(ValueError, match=r"leaf 'layers/mlp/extra' has no sharding rule"):
        param_shardings(make_mesh(), {"layers": {"mlp": {"extra": jnp.zeros(3)}}})
    with pytest.raises(
        ValueError, match=r"leaf 'embed/embedding' .* axis 0 of 258 does not divide over mesh.model = 4"
    ):
        leaf_spec(make_mesh(2, 4), "embed/embedding", (258, 64), RULES)
    with pytest.raises(ValueError, match=r"leaf 'layers/attn/k/kernel' has 4 heads, .* mesh.model = 8"):
        check_heads(SMALL, 8)
    with pytest.raises(ValueError, match=r"its part|has the sharding rule"):
        leaf_spec(make_mesh(4, 2), "embed/embedding", (264,), RULES)


def test_a_mesh_is_chosen_from_the_devices_and_the_models_size():
    member = 4 * sum(int(np.prod(shape)) for shape in param_shapes(SMALL).values())
    for memory, model in ((None, 1), (4 * member, 1), (2 * member, 2), (member, 4), (member // 9, 4)):
        assert members_spread(SMALL, 8, member_bytes=member, memory=memory) == model
    config = config_of("", FIELDS)
    assert mesh_of(config, SMALL, memory=2 * member).shape == {GROUPS: 4, MODEL: 2}
    assert mesh_of(config_of("", FIELDS, mesh={"groups": 8}), SMALL, memory=member).shape == {GROUPS: 8, MODEL: 1}
    assert mesh_of(config_of("", FIELDS, mesh={"groups": 1}), SMALL).shape == {GROUPS: 1, MODEL: 1}
    for memory, before, model, why in [
        (None, None, 1, "the devices do not report their memory"),
        (2 * member, None, 2, "at most a third of 2 ×"),
        (member // 9, None, 4, "more than a third of 4 ×"),
        (4 * member, 2, 2, "as many devices share a member as when the run began"),
        (2 * member, 1, 2, "at most a third of 2 ×"),  # one device has no room here
        (4 * member, 16, 1, "at most a third of 1 ×"),  # nor are there sixteen
    ]:
        mesh, said = choose_mesh(config, SMALL, memory=memory, before=before)
        assert mesh.shape[MODEL] == model and said.startswith(f"mesh: groups {8 // model} × model {model} of 8 devices")
        assert why in said
    assert "set by mesh.model" in choose_mesh(config_of("", FIELDS, mesh={"model": 2}), SMALL)[1]
    with pytest.raises(ValueError, match=r"do not divide evenly over mesh\.model = 8"):
        mesh_of(config_of("", FIELDS, mesh={"model": 8}), SMALL)


@pytest.mark.parametrize("model", [2, 4])
def test_logits_on_several_devices_are_near_those_on_one(params, model):
    """The partial sums of attention and MLP are added over devices, in another order than on one."""
    mesh, tokens = make_mesh(8 // model, model), jnp.arange(40).reshape(2, 20) * 5
    apply = jax.jit(lambda p: Transformer(SMALL).apply(p, tokens)[0])
    cut = map_named(
        lambda name, leaf: NamedSharding(mesh, only(leaf_spec(mesh, name, leaf.shape, RULES), MODEL)), params
    )
    alone, together = apply(params), apply(jax.device_put(params, cut))
    scale = float(jnp.abs(alone).max())
    assert float(jnp.abs(alone - together).max()) <= 16 * 2.0**-23 * scale  # measured: 5 to 8, three seeds


def evaluator_of(mesh, *, unroll=False, **fields):
    engine = Engine(SMALL, slots=3, max_prompt_tokens=8, max_new_tokens=4, stop_token_ids=(1,), unroll=unroll)
    config = config_of("", FIELDS, **fields)
    return Evaluator.of(config, engine, mesh)


def test_members_are_made_the_same_on_every_mesh(params):
    """The bits of member 1, wherever it was made; with two members at once too."""
    made = []
    everyone = Population(16, seed=0).members(0)
    for groups, model, at_once in ((1, 1, 1), (1, 1, 2), (8, 1, 2), (4, 2, 1), (2, 4, 2)):
        mesh = make_mesh(groups, model)
        evaluator = evaluator_of(mesh, decode={"members_at_once": at_once}, es={"population": 16})
        assert evaluator.at_once == at_once
        perturbed = evaluator._perturb(placed(params, mesh), everyone[np.arange(evaluator.lanes)])
        made.append({name: np.asarray(leaf[0]) for name, leaf in named_leaves(perturbed)})
    assert all(same(made[0], other) for other in made[1:])


@pytest.mark.parametrize("at_once", [500, 1056, 10**6])
def test_an_embedding_gathered_by_blocks_of_rows_is_the_whole_one(params, monkeypatch, at_once):
    monkeypatch.setattr("es_jax.training.es.ROWS_AT_ONCE", at_once)  # blocks that divide the rows, and not; one block
    everyone, found = Population(16, seed=0).members(0), []
    for groups, model in ((1, 1), (8, 1), (4, 2)):
        mesh = make_mesh(groups, model)
        evaluator = evaluator_of(mesh, es={"population": 16, "sigma": at_once / 1e5})  # each compiled anew
        perturbed = evaluator._perturb(placed(params, mesh), everyone[np.arange(groups)])
        found.append(np.asarray(perturbed["embed"]["embedding"][0]))
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(("model", "at_once"), [(1, 1), (4, 1), (1, 2)])
def test_a_kernel_makes_the_members_that_the_program_makes(params, monkeypatch, model, at_once):
    mesh = make_mesh(1, model)
    evaluator = evaluator_of(mesh, decode={"members_at_once": at_once}, model={"dtype": "bfloat16"})
    arguments = placed(params, mesh), Population(4, seed=0).members(0)[np.arange(at_once)]

    def perturbed():
        return jax.jit(lambda *arguments: Evaluator._perturb.__wrapped__(evaluator, *arguments))(*arguments)

    def by_kernel(self, name, part, spec, member, layer):
        return self._perturbed_in_one_pass(name, part, only(spec, MODEL), member, interpret=True)

    expected = dict(named_leaves(perturbed()))
    monkeypatch.setattr(Evaluator, "_perturbed_leaf", by_kernel)
    assert same(expected, dict(named_leaves(perturbed())))


@pytest.mark.unchecked  # descriptions of arrays pass through the tree
@pytest.mark.parametrize("wide", [1, 1000])
def test_layers_made_apart_are_those_made_together(params, monkeypatch, wide):
    monkeypatch.setattr("es_jax.generate.engine.WIDE", wide)  # kernels transposed, or as they are
    together = None
    for groups, model in ((1, 1), (4, 2)):
        mesh = make_mesh(groups, model)
        members = Population(16, seed=0).members(0)[np.arange(groups)]
        es = {"population": 16, "sigma": 0.01 + wide / 1e6}  # so that it is compiled anew
        evaluator = evaluator_of(mesh, unroll=True, es=es, model={"dtype": "bfloat16"})
        made = evaluator.perturb(placed(params, mesh), members)
        assert len(made["layers"]) == SMALL.layers
        assert isinstance(made["layers"][0]["mlp"]["up"]["kernel"], Transposed) == (wide == 1)
        together = evaluator._perturb(placed(params, mesh), members) if together is None else together
        first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), (made, together))
        assert jax.tree.structure(first[0]) == jax.tree.structure(first[1])
        assert same(*first)


def traffic(compiled):
    """(kind, dtype, shape, group size) of every collective in a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVES.search(line):
            dtype, shape, kind = match.groups()
            found.append((kind, dtype, tuple(map(int, filter(None, shape.split(",")))), line))
    return found


@pytest.mark.unchecked  # `lower` puts descriptions where arrays stand
def test_members_are_gathered_a_layer_at_a_time(params):
    mesh = make_mesh(4, 2)
    members = Population(4, seed=0).members(0)
    sent = traffic(Evaluator._perturb.lower(evaluator_of(mesh), placed(params, mesh), members).compile())
    assert {kind for kind, *_ in sent} == {"all-gather"}
    assert {dtype for _, dtype, *_ in sent} == {"f32"}
    vocabulary, layer = 264 * 32 // 2, 32 * 64 // 2  # a group's half of the embedding, and of one layer's MLP
    assert sorted({math.prod(shape) for _, _, shape, _ in sent})[-2:] == [layer, vocabulary]


def test_decoding_sends_nothing_between_groups_and_keeps_the_cache_cut(params):
    mesh = make_mesh(4, 2)
    evaluator = evaluator_of(mesh)
    members = Population(4, seed=0).members(0)
    perturbed = evaluator._perturb(placed(params, mesh), members)
    prompts = [[1, 2, 3], [4], [5, 6]]
    tokens, positions, prefix = evaluator.engine.packing(prompts).pack(prompts, rows=3)
    rows = Prompts(np.repeat(tokens[None], 4, 0), np.repeat(positions[None], 4, 0), prefix)
    compiled = evaluator._decode.lower(evaluator, perturbed, rows).compile()
    sent = traffic(compiled)
    assert sent, "members on two devices must talk"
    for *_, line in sent:
        groups = re.search(r"replica_groups=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line).group(1)
        assert groups in ("{{0,1},{2,3},{4,5},{6,7}}", "[4,2]<=[8]"), line
    cache = SMALL.layers * 3 * 8 * SMALL.kv_heads * SMALL.head_dim  # numbers of its keys
    held = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())}
    assert cache // 2 in held and cache not in held
    wq = dict(named_leaves(perturbed))["layers/attn/q/kernel"]
    assert wq.sharding.spec == PartitionSpec(GROUPS, None, None, MODEL)


def entry_of(config, step):
    members = Population(6, seed=0, antithetic=config.es.antithetic).members(step)
    return Entry.of(step, members, rewards=np.zeros(6), weights=np.arange(6.0), rates=config.rates(step))


@pytest.mark.unchecked  # `lower` puts descriptions where arrays stand
def test_a_plan_compiles_the_update_that_a_run_compiles(qwen, params):
    """Also of runs that differ in σ, α, λ, N and schedules, where N is in the shapes alone."""
    mesh, digests = make_mesh(4, 2), set()
    for optim, es in (
        ({"anchor": {"penalty": "l2", "kappa": 1.0}}, {}),
        (
            {"anchor": {"penalty": "l2", "strength": 3.0, "schedule": "linear:0.5"}, "learning_rate": 0.02},
            {"sigma": 0.1},
        ),
        ({"name": "adam", "anchor": {"penalty": "l1", "strength": 1.0, "ema_decay": 0.9}}, {"antithetic": True}),
        ({"name": "momentum", "max_grad_norm": 1.0, "anchor": {"penalty": "none"}}, {"noise": "shared_seed"}),
    ):
        config = config_of(qwen, FIELDS, optim=optim, es=es)
        with jax.numpy_dtype_promotion("standard"):  # optax's adam needs it
            state = State(config, mesh, placed(params, mesh))
            run = update_on(mesh).lower(*state.update_arguments(entry_of(config, 1)))
            plan = Programs(config, SMALL, mesh).update().lower()
        run, plan = (hashlib.sha256(lowered.as_text().encode()).hexdigest() for lowered in (run, plan))
        assert run == plan
        digests.add(run)
    assert len(digests) == 3  # the first two are one program


@pytest.mark.parametrize(("penalty", "noise"), [("l2", "gaussian"), ("none", "gaussian"), ("l2", "low_rank")])
@pytest.mark.unchecked  # `lower` puts descriptions where arrays stand
def test_the_update_sends_nothing_and_works_in_place(params, penalty, noise):
    mesh, start = make_mesh(4, 2), dict(named_leaves(host(params)))
    anchor = {"penalty": penalty} | ({"strength": 1.0} if penalty != "none" else {})
    config = config_of("", FIELDS, optim={"learning_rate": 0.01, "anchor": anchor}, es={"noise": noise})
    state = State(config, mesh, placed(params, mesh))
    arguments = state.update_arguments(entry_of(config, 1))
    assert traffic(update_on(mesh).lower(*arguments).compile()) == []
    leaf = lambda: dict(named_leaves(state.params))["layers/mlp/up/kernel"]  # noqa: E731
    where = [shard.data.unsafe_buffer_pointer() for shard in leaf().addressable_shards]
    before = state.params
    state.apply(entry_of(config, 1))
    assert [shard.data.unsafe_buffer_pointer() for shard in leaf().addressable_shards] == where
    assert [name for name, x in named_leaves(before) if not x.is_deleted()] == []
    moved = [np.asarray(leaf, np.float64) - start[name] for name, leaf in named_leaves(state.params)]
    expected = np.sqrt(sum(np.sum(np.square(x)) for x in moved))
    assert float(state.drift) == pytest.approx(expected, rel=1e-5)


def test_an_anchor_in_host_memory_gives_the_same_bits(params, tmp_path):
    mesh, ends = make_mesh(4, 2), []
    for memory in ("device", "pinned_host"):
        anchor = {"penalty": "l2", "strength": 1.0, "memory": memory}
        config = config_of("", FIELDS, optim={"name": "momentum", "learning_rate": 0.01, "anchor": anchor})
        state = State(config, mesh, placed(params, mesh))
        for step in (1, 2):
            state.apply(entry_of(config, step))
            held = {leaf.sharding.memory_kind for name, leaf in named_leaves(state.opt_state) if "anchor/" in name}
            assert held == {memory}
        ends.append(host(state.params))
    assert same(*ends)
    other = config_of("", FIELDS, optim={"anchor": anchor})
    object.__setattr__(other.optim.anchor, "memory", "elsewhere")
    with pytest.raises(ValueError, match=r"optim.anchor.memory is 'elsewhere', but .* has .*pinned_host"):
        State(other, mesh, placed(params, mesh))
