"""The laws of generation, over families, layouts and samplers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from es_jax.core import rng
from es_jax.core.mesh import make_mesh
from es_jax.es.population import Population
from es_jax.generate.decode_spec import CHUNK
from es_jax.generate.engine import Engine, Generation
from es_jax.generate.prompts import Packing
from es_jax.generate.sampling import Greedy, Temperature, TopK, TopP
from es_jax.generate.score import score_tokens
from es_jax.models.config import TransformerConfig
from es_jax.models.decode_attention import NAME
from es_jax.models.transformer import Transformer
from es_jax.training.config import freeze
from es_jax.training.es import Evaluator

COMMON = dict(vocab_size=40, width=32, layers=2, heads=4, head_dim=16, mlp_dim=48)
CONFIGS = {
    "llama": TransformerConfig(family="llama", kv_heads=2, tied_embeddings=True, **COMMON),
    "qwen2": TransformerConfig(family="qwen2", kv_heads=1, qkv_bias=True, **COMMON),
}
PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 31], [39] * 6]
SAMPLERS = (Greedy(), Temperature(0.8), TopK(5), TopP(0.7))
every_family = pytest.mark.parametrize("family", CONFIGS)
WAYS = {"unrolled": {"unroll": True}, "scanned": {"unroll": False}, "in place": {"in_place": True}}
every_way = pytest.mark.parametrize("way", WAYS)


@functools.cache
def params_of(family, scale=8.0):
    """Random weights, scaled up so that the likeliest token is not always the same."""
    params = jax.jit(Transformer(CONFIGS[family]).init)(jax.random.key(1))
    return jax.tree.map(lambda x: x * scale, params)


def engine(family, **options):
    return Engine(
        CONFIGS[family], **(dict(slots=2, max_prompt_tokens=12, max_new_tokens=10, stop_token_ids=(11, 12)) | options)
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(family, params, tokens):
    return Transformer(CONFIGS[family]).apply(params, tokens)[0]  # causal: what follows a token does not matter


def naive(family, params, prompt, *, max_new_tokens=10, stop_token_ids=(11, 12)):
    """Greedy decoding by a full forward pass a token, without a cache; padding keeps one shape."""
    row = list(prompt)
    for _ in range(max_new_tokens):
        padded = np.zeros((1, 72), np.int32)
        padded[0, : len(row)] = row
        logits = forward(family, params, padded)
        row.append(int(jnp.argmax(logits[0, len(row) - 1])))
        if row[-1] in stop_token_ids:
            break
    return row[len(prompt) :]


def rows(generation):
    return [tokens[:n].tolist() for tokens, n in zip(generation.tokens, generation.length, strict=True)]


@every_family
@every_way
def test_greedy_equals_a_naive_full_forward(family, way):
    params = params_of(family)
    got = rows(engine(family, **WAYS[way]).generate(params, PROMPTS))
    assert got == [naive(family, params, prompt) for prompt in PROMPTS]
    assert len({tuple(row) for row in got}) > 2  # the rows do differ


def test_rows_end_at_any_stop_token_and_hold_zeros_behind():
    params = params_of("llama")
    free = rows(engine("llama", stop_token_ids=(), max_new_tokens=8).generate(params, PROMPTS))
    stops = (free[0][3], free[2][1])
    generation = engine("llama", stop_token_ids=stops, max_new_tokens=8).generate(params, PROMPTS)
    for row, tokens, kept in zip(rows(generation), generation.tokens, free, strict=True):
        ends = [i for i, token in enumerate(kept) if token in stops]
        assert row == (kept[: ends[0] + 1] if ends else kept)
        assert not tokens[len(row) :].any()
    assert min(generation.length) < 8


@pytest.mark.parametrize(("sampler", "way"), [*((s, "unrolled") for s in SAMPLERS), (Temperature(0.8), "in place")])
def test_a_neighbour_never_changes_a_row_and_slots_equal_one_by_one(sampler, way):
    params, key = params_of("llama", 4.0), jax.random.key(3)
    of = lambda slots: engine("llama", slots=slots, sampler=sampler, **WAYS[way])  # noqa: E731
    together = rows(of(3).generate(params, PROMPTS, key=key))
    assert rows(of(1).generate(params, PROMPTS, key=key)) == together
    others = [PROMPTS[0], [9] * 12, *PROMPTS[2:]]
    swapped = rows(of(3).generate(params, others, key=key))
    assert swapped[0] == together[0] and swapped[2:] == together[2:]


LONG = 40  # new tokens: more than a chunk
QUEUE = [[int(i) for i in np.random.default_rng(row).integers(0, 40, 1 + 5 * row % 12)] for row in range(11)]


def stops(family, prompts, places):
    """Stop tokens that end the rows named at the places named."""
    free = rows(
        engine(family, stop_token_ids=(), max_new_tokens=LONG, slots=len(prompts)).generate(params_of(family), prompts)
    )
    return tuple({free[row][place] for row, place in places})


@every_way
def test_a_queue_longer_than_the_slots_equals_decoding_one_by_one(way):
    params, ends = params_of("llama"), stops("llama", QUEUE, [(1, 0)])
    options = dict(stop_token_ids=ends, max_new_tokens=LONG, logprobs=True) | WAYS[way]
    got = engine("llama", slots=4, **options).generate(params, QUEUE)
    assert rows(got) == [naive("llama", params, prompt, max_new_tokens=LONG, stop_token_ids=ends) for prompt in QUEUE]
    lengths = set(got.length.tolist())
    assert {1, LONG} <= lengths and len(lengths) > 2  # some stop at once, some are cut, some stop between
    alone = engine("llama", slots=1, **options)
    for i in (0, 1, 5, 8):
        np.testing.assert_allclose(got.logprob[i], alone.generate(params, [QUEUE[i]]).logprob[0], atol=1e-3)


def test_all_rows_may_stop_at_once_and_one_token_may_be_the_limit():
    params = params_of("llama")
    assert (
        engine("llama", stop_token_ids=tuple(range(40)), max_new_tokens=LONG).generate(params, QUEUE).length.tolist()
        == [1] * 11
    )
    once = engine("llama", stop_token_ids=(), max_new_tokens=1).generate(params, QUEUE)
    assert rows(once) == [naive("llama", params, prompt, max_new_tokens=1, stop_token_ids=()) for prompt in QUEUE]


@every_way
def test_a_shared_prefix_is_computed_once_and_changes_nothing(way):
    params, shared = params_of("qwen2"), [5, 9, 2, 33] * 5
    prompts = [shared + prompt for prompt in QUEUE]
    e = engine("qwen2", slots=4, max_prompt_tokens=40, max_new_tokens=LONG, logprobs=True, **WAYS[way])
    packing = e.packing(prompts)
    assert (len(packing.prefix), packing.width) == (16, 24)
    together = e.generate(params, prompts)
    apart = Packing((), 40).pack(prompts, rows=len(prompts))
    plain = jax.jit(e.decode)(e.layout(params), apart.tokens, apart.positions)
    assert rows(together) == rows(plain)
    np.testing.assert_allclose(together.logprob, plain.logprob, atol=1e-3)


def test_sampling_is_keyed_by_row_and_not_by_slot():
    params, key = params_of("llama", 4.0), jax.random.key(3)
    options = dict(sampler=Temperature(0.8), max_new_tokens=LONG)
    sampled = rows(engine("llama", slots=3, **options).generate(params, QUEUE, key=key))
    assert rows(engine("llama", slots=11, **options).generate(params, QUEUE, key=key)) == sampled
    assert len({tuple(row) for row in rows(engine("llama", **options).generate(params, [[3]] * 4, key=key))}) > 1


@pytest.mark.parametrize("way", ["unrolled", "in place"])
def test_groups_of_devices_run_loops_of_their_own_lengths(way):
    """Eight queues under shard_map, of 0 to 7 prompts each: no group waits for another's loop."""
    params, mesh = params_of("llama"), make_mesh(8)
    e = engine("llama", slots=2, max_new_tokens=LONG, **WAYS[way])
    packs = [Packing((), 12).pack(QUEUE[:n], rows=7) for n in range(8)]
    tokens, positions = (np.stack([pack[i] for pack in packs]) for i in (0, 1))

    def group(params, tokens, positions):
        return jax.tree.map(lambda x: x[None], e.decode(params, tokens[0], positions[0]))

    specs = (PartitionSpec(), PartitionSpec("groups"), PartitionSpec("groups"))
    program = (
        jax.jit(jax.shard_map(group, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("groups"), check_vma=False))
        .lower(e.layout(params), tokens, positions)
        .compile()
    )
    assert not re.search(r"all-reduce|all-gather|collective-permute|all-to-all", program.as_text())
    out, expected = program(e.layout(params), tokens, positions), rows(e.generate(params, QUEUE))
    for n in range(8):
        own = rows(Generation(out.tokens[n], out.length[n], None))
        assert own[:n] == expected[:n] and not np.any(out.length[n][n:])


def test_members_in_step_equal_members_alone_and_choose_between_no_caches():
    e = engine("llama", slots=3, max_new_tokens=LONG)
    members = [jax.tree.map(lambda x, i=i: x * (1 + 0.05 * i), params_of("llama")) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(e.layout, members))
    rows_of = jax.tree.map(jnp.asarray, Packing((), 12).pack(QUEUE, rows=11))

    def decode(axis_name):
        one = lambda params: e.decode(params, rows_of.tokens, rows_of.positions, axis_name=axis_name)  # noqa: E731
        return jax.vmap(one, axis_name="lane")

    out = jax.jit(decode("lane"))(stacked)
    for i, member in enumerate(members):
        assert rows(Generation(out.tokens[i], out.length[i], None)) == rows(e.generate(member, QUEUE))
    text = {name: jax.jit(decode(name)).lower(stacked).as_text().splitlines() for name in ("lane", None)}
    places = f"x{12 + LONG + CHUNK}xf32>"  # of the slots' keys
    choices = {name: [x for x in lines if "stablehlo.select" in x and places in x] for name, lines in text.items()}
    assert not choices["lane"] and choices[None]


def test_members_decode_in_place_where_one_has_a_device_for_itself():
    """Several at once, members that share weights, and weights cut over devices go the other way."""
    e = engine("llama", slots=2, in_place=True)
    config = freeze({"es": {"sigma": 0.01, "population": 4}})
    several = dataclasses.replace(config, decode=dataclasses.replace(config.decode, members_at_once=2))
    shared = dataclasses.replace(config, es=dataclasses.replace(config.es, noise="low_rank"))
    alone, others = Evaluator.of(config, e, make_mesh(8)), [(several, make_mesh(1)), (shared, make_mesh(1))]
    others += [(config, make_mesh(4, 2))]
    assert alone.engine.writes_in_place and alone.layer_by_layer
    assert not any(Evaluator.of(config, e, mesh).engine.writes_in_place for config, mesh in others)
    members, packed = Population(4, seed=0).members(1), e.packing(PROMPTS).pack(PROMPTS, rows=5)
    unrolled = Evaluator.of(config, engine("llama", slots=2), make_mesh(8))
    got, wanted = (
        {
            member: rows(Generation(*out, None))
            for member, *out in evaluator.members(params_of("llama"), members, packed)
        }
        for evaluator in (alone, unrolled)
    )
    assert got == wanted and len(got) == 4


@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_is_in_the_program_that_decodes_in_place_and_in_no_other(way):
    params, packed = params_of("llama"), Packing((), 12).pack(PROMPTS, rows=5)
    e = engine("llama", **WAYS[way])
    program = str(jax.make_jaxpr(e.decode)(e.layout(params), packed.tokens, packed.positions))
    assert (NAME in program) == (way == "in place")


def test_in_place_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"in_place is True: it needs unrolled layers \(unroll is False\)"):
        engine("llama", in_place=True, unroll=False)
    with pytest.raises(ValueError, match=r"heads with 16, 32, 64, 128 or 256 numbers \(they have 8\)"):
        dataclasses.replace(engine("llama", in_place=True), config=dataclasses.replace(CONFIGS["llama"], head_dim=8))


@every_family
def test_the_second_call_compiles_nothing(family, compilations):
    params, e = params_of(family), engine(family, slots=3, max_new_tokens=LONG)
    other = jax.tree.map(lambda x: x + np.float32(0.1), params)
    e.generate(params, QUEUE)
    before = compilations()
    e.generate(other, QUEUE[::-1])
    assert compilations() == before
    e.generate(other, QUEUE[:1])
    assert compilations() > before  # another number of rows is another program: the count does count


@every_family
@pytest.mark.parametrize("sampler", SAMPLERS[:2], ids=lambda s: type(s).__name__)
def test_log_probabilities_equal_score_tokens(family, sampler):
    params = params_of(family, 3.0)
    generation = engine(family, sampler=sampler, logprobs=True).generate(params, PROMPTS, key=jax.random.key(0))
    whole = [prompt + row for prompt, row in zip(PROMPTS, rows(generation), strict=True)]
    width = max(map(len, whole))
    tokens = np.array([row + [0] * (width - len(row)) for row in whole], np.int32)
    mask = np.array([[True] * len(row) + [False] * (width - len(row)) for row in whole])
    scored = score_tokens(CONFIGS[family], params, tokens, mask)
    for i, prompt in enumerate(PROMPTS):
        n = generation.length[i]
        np.testing.assert_allclose(generation.logprob[i, :n], scored[i, len(prompt) : len(prompt) + n], atol=1e-4)
        assert not generation.logprob[i, n:].any() and not scored[i, 0]


def test_score_tokens_ignores_padding_on_either_side():
    params, row = params_of("llama", 3.0), [5, 6, 7, 8]
    plain = score_tokens(CONFIGS["llama"], params, jnp.array([row]), jnp.ones((1, 4), bool))
    tokens = jnp.array([[1, 1, *row], [*row, 1, 1]])
    mask = jnp.array([[False] * 2 + [True] * 4, [True] * 4 + [False] * 2])
    padded = score_tokens(CONFIGS["llama"], params, tokens, mask)
    np.testing.assert_allclose(padded[0, 2:], plain[0], atol=1e-5)
    np.testing.assert_allclose(padded[1, :4], plain[0], atol=1e-5)


def test_samplers_draw_from_their_distributions():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.vmap(rng.key)(jnp.arange(20_000, dtype=jnp.uint32))

    def frequencies(sampler):
        return np.bincount(jax.vmap(lambda k: sampler(logits, k))(keys), minlength=4) / len(keys)

    np.testing.assert_allclose(frequencies(Temperature(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(frequencies(Temperature(2.0)), hot / hot.sum(), atol=0.02)
    np.testing.assert_allclose(frequencies(TopK(2)), [0.625, 0.375, 0, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(TopP(0.6)), [0.625, 0.375, 0, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(TopP(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.02)
    assert frequencies(Greedy())[0] == 1


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "prompts", "says"),
    [
        ({"slots": 0}, PROMPTS, "slots is 0"),
        ({"slots": 2.5}, PROMPTS, "slots is 2.5: it must be a whole number"),
        ({"stop_token_ids": (40,)}, PROMPTS, "stop token 40"),
        ({}, ["abc"], "prompt 0 is 'abc'"),
        ({}, [[1], [1.5]], "prompt 1 is"),
        ({}, [1, 2], "prompt 0 is 1"),
        ({"max_new_tokens": 10**9}, PROMPTS, "set max_new_tokens to at most"),
        ({}, [], "no prompts"),
        ({}, [[1], []], "prompt 1 has 0 tokens"),
        ({}, [[1] * 13], "max_prompt_tokens = 12"),
        ({}, [[40]], "vocabulary"),
        ({"sampler": Temperature(1.0)}, PROMPTS, "pass key="),
    ],
)
def test_bad_input_is_refused(options, prompts, says):
    with pytest.raises(ValueError, match=says):
        engine("llama", **options).generate(params_of("llama"), prompts)


@pytest.mark.parametrize("size", [1, 7, 64, 97, 1000, 49152])
def test_greedy_is_the_first_of_the_likeliest(size):
    logits = jax.random.randint(jax.random.key(size), (20, size), 0, 5).astype(jnp.float32)  # with many ties
    assert jax.vmap(lambda row: Greedy()(row, None))(logits).tolist() == np.argmax(logits, axis=1).tolist()


def test_bad_samplers_are_refused():
    for make in (lambda: Temperature(0.0), lambda: TopK(0), lambda: TopP(1.5), lambda: TopP(0.5, t=-1)):
        with pytest.raises(ValueError, match=r"is (0.0|0|1.5|-1): it must be (above|at least)"):
            make()


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_next_round_is_dispatched_before_one_is_graded(at_once, monkeypatch):
    """So that the devices decode while the host grades."""
    events, decode = [], Evaluator._decode
    monkeypatch.setattr(Evaluator, "_decode", lambda *args: events.append("dispatched") or decode(*args))
    mesh, e = make_mesh(1), engine("llama", slots=2)
    config = freeze({"es": {"sigma": 0.01}, "decode": {"members_at_once": at_once}})
    evaluator = Evaluator.of(config, e, mesh)
    members = Population(6, seed=0).members(1)
    for member, tokens, _ in evaluator.members(params_of("llama"), members, e.packing(PROMPTS).pack(PROMPTS, rows=5)):
        assert tokens.shape == (5, 10)
        events.append(member)
    graded = [event for event in events if event != "dispatched"]
    assert graded == list(range(6))
    for member in graded[:-at_once]:
        before = events[: events.index(member)].count("dispatched")
        assert before == member // at_once + 2


def test_one_task_is_dispatched_ahead_of_the_one_that_is_graded_and_no_more(monkeypatch):
    """A CPU would run all of them side by side, with all their caches in memory."""
    events, decode = [], Evaluator._decode
    monkeypatch.setattr(Evaluator, "_decode", lambda *args: events.append("dispatched") or decode(*args))
    e = engine("llama", slots=2)
    evaluator = Evaluator.of(freeze({"es": {"sigma": 0.01}}), e, make_mesh(1))
    queues = [e.packing(PROMPTS).pack(PROMPTS, rows=5)] * 3
    for task, lanes in enumerate(evaluator.unperturbed(params_of("llama"), queues)):
        assert lanes[0][1].shape == (6, 10) and lanes[0][0] == range(5)
        events.append(task)
    assert events == ["dispatched", "dispatched", 0, "dispatched", 1, 2]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("count", [3, 20])
def test_held_out_prompts_are_dealt_to_all_devices(at_once, count):
    e, prompts = engine("llama", slots=4), [[1 + i, 3] for i in range(count)]
    evaluator = Evaluator.of(freeze({"es": {"sigma": 0.01}, "decode": {"members_at_once": at_once}}), e, make_mesh(8))
    queue = e.packing(prompts).pack(prompts, rows=count)
    (lanes,) = evaluator.unperturbed(params_of("llama"), [queue])
    share = count / evaluator.lanes
    assert all(int(share) <= len(rows) <= share + 1 for rows, _, _ in lanes.values())
    assert len(lanes) == min(count, evaluator.lanes)
    found = {row: list(t[i, : n[i]]) for rows, t, n in lanes.values() for i, row in enumerate(rows)}
    alone = e.generate(params_of("llama"), prompts)
    assert [found[i] for i in range(count)] == [list(t[:n]) for t, n in zip(alone.tokens, alone.length, strict=True)]


def test_no_step_copies_the_cache_of_its_chunk():
    """Read from the compiled program: outside its entry, where the caches begin, no copy has the shape of one."""
    config = TransformerConfig(
        family="llama", vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=24
    )
    engine = Engine(config, slots=3, max_prompt_tokens=7, max_new_tokens=20, stop_token_ids=(0,), unroll=True)
    params = jax.eval_shape(lambda: engine.layout(Transformer(config).init(jax.random.key(0))))
    rows = jax.ShapeDtypeStruct((3, 7), jnp.int32)
    text = jax.jit(engine.decode).lower(params, rows, rows).compile().as_text()
    inside = text.partition("\nENTRY ")[0]
    copied = re.compile(r"= f32\[3,2,(?:8,19|19,8)\]\S* copy\(%(?!param)")
    assert "f32[3,2,8,19]" in inside and not copied.findall(inside)
