"""The anchored decay: its definition, leaves and trees of every kind, and its place among optax's wrappers.

This file needs nothing but jax, numpy, optax, pytest and anchored.py, so both can be lifted into another project:
change the import below. docs/awd.md says how.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from es_jax.optim.anchored import anchored_weight_decay as awd

every_penalty = pytest.mark.parametrize("penalty", ["l2", "l1"])


# The definition.


def tree(seed=0, dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(a, (8, 16), dtype), "b": {"c": jax.random.normal(b, (24,), dtype)}}


def reference(theta, step, anchor, rate, penalty):
    """Section "anchored weight decay" of the paper, in float64."""
    moved = theta + step - anchor
    if penalty == "l2":
        return anchor + (1 - rate) * moved
    return anchor + np.sign(moved) * np.maximum(np.abs(moved) - rate, 0)


@every_penalty
def test_equals_the_definition_in_float64(penalty):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        anchor, theta, u = (rng.standard_normal(1000) for _ in range(3))
        tx = awd(0.3, penalty=penalty)
        state = tx.init({"w": jnp.asarray(anchor)})
        params = {"w": jnp.asarray(theta)}
        updates, _ = tx.update({"w": jnp.asarray(u)}, state, params)
        assert updates["w"].dtype == jnp.float64
        got = optax.apply_updates(params, updates)["w"]
        np.testing.assert_allclose(got, reference(theta, u, anchor, 0.3, penalty), atol=1e-14)


@every_penalty
def test_published_arithmetic_rounds_every_result(penalty):
    """In float16 the step, the difference, the shrinking and the sum are rounded one by one."""
    anchor, theta, u = (0.025 * np.random.default_rng(i).standard_normal(4000) for i in range(3))
    rate = 0.005 if penalty == "l2" else 5e-6
    a, p, step = (x.astype(np.float16) for x in (anchor, theta, 1e-2 * u))
    moved = (p + step) - a
    if penalty == "l2":
        moved = np.float16(1 - rate) * moved
    else:
        moved = np.sign(moved) * np.maximum(np.abs(moved) - np.float16(rate), np.float16(0))
    tx = awd(rate, penalty=penalty, arithmetic="param")
    updates, _ = tx.update({"w": jnp.asarray(step)}, tx.init({"w": jnp.asarray(a)}), {"w": jnp.asarray(p)})
    got = np.asarray(optax.apply_updates({"w": jnp.asarray(p)}, updates)["w"])
    np.testing.assert_allclose(got, a + moved, rtol=2e-3, atol=1e-6)
    plain, _ = awd(rate, penalty=penalty).update({"w": jnp.asarray(step)}, tx.init({"w": a}), {"w": jnp.asarray(p)})
    exact = np.asarray(optax.apply_updates({"w": jnp.asarray(p)}, plain)["w"])
    assert np.mean(got == a + moved) > 0.9 > np.mean(exact == a + moved)
    with pytest.raises(ValueError, match="arithmetic is 'f16'"):
        awd(0.1, arithmetic="f16")


@every_penalty
def test_rate_0_is_the_identity(penalty):
    params, u = tree(), tree(1)
    updates, _ = awd(0.0, penalty=penalty).update(u, awd(0.0).init(tree(2)), params)
    jax.tree.map(np.testing.assert_array_equal, updates, u)


def test_l2_rate_1_from_a_schedule_lands_on_the_anchor():
    anchor = tree()
    params = jax.tree.map(lambda x: 1.25 * x, anchor)
    tx = awd(lambda count: 1.0)
    updates, _ = tx.update(tree(1), tx.init(anchor), params)
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), anchor)


def test_l1_reaches_the_anchor_exactly_and_stays():
    params = anchor = tree()
    tx = awd(0.01, penalty="l1")
    state = tx.init(params)
    params = jax.tree.map(lambda x: x + 0.035, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(5):
        updates, state = tx.update(zero, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, params, anchor)


@every_penalty
def test_schedule_counts_updates(penalty):
    tx = awd(lambda count: jnp.where(count == 1, 0.5, 0.0), penalty=penalty)
    state = tx.init({"w": jnp.zeros(3)})
    params, zero, seen = {"w": jnp.full(3, 4.0)}, {"w": jnp.zeros(3)}, []
    for _ in range(3):
        updates, state = tx.update(zero, state, params)
        seen.append(float(updates["w"][0]))
    assert seen == [0.0, -2.0 if penalty == "l2" else -0.5, 0.0]


@pytest.mark.parametrize("mask", [{"a": True, "b": False}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)])
def test_mask_leaves_alone_what_it_excludes(mask):
    tx = awd(0.5, mask=mask)
    state = tx.init(tree())
    updates, _ = tx.update(tree(1), state, tree(2))
    np.testing.assert_array_equal(updates["b"]["c"], tree(1)["b"]["c"])
    expected = reference(tree(2)["a"], tree(1)["a"], tree()["a"], 0.5, "l2") - np.asarray(tree(2)["a"])
    np.testing.assert_allclose(updates["a"], expected, atol=1e-6)
    anchored = [leaf.shape for leaf in jax.tree.leaves(optax.tree_utils.tree_get(state, "anchor"))]
    assert anchored == [(8, 16)]  # no anchor is kept for the rest


@every_penalty
def test_inside_optax_wrappers(penalty):
    params, u = tree(), tree(1)
    moved = jax.tree.map(lambda x: x + 1.0, params)
    expected, _ = awd(0.25, penalty=penalty).update(u, awd(0.25).init(params), moved)

    masked = optax.masked(awd(0.25, penalty=penalty), {"a": True, "b": False})
    got, _ = masked.update(u, masked.init(params), moved)
    np.testing.assert_array_equal(got["a"], expected["a"])
    np.testing.assert_array_equal(got["b"]["c"], u["b"]["c"])

    labels = {"a": "pull", "b": "free"}
    multi = optax.multi_transform({"pull": awd(0.25, penalty=penalty), "free": optax.identity()}, labels)
    got, _ = multi.update(u, multi.init(params), moved)
    np.testing.assert_array_equal(got["a"], expected["a"])
    np.testing.assert_array_equal(got["b"]["c"], u["b"]["c"])

    injected = optax.inject_hyperparams(awd, static_args=("penalty",))(rate=0.75, penalty=penalty)
    state = injected.init(params)
    state.hyperparams["rate"] = jnp.float32(0.25)
    got, _ = jax.jit(injected.update)(u, state, moved)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-6), got, expected)

    scheduled = optax.inject_hyperparams(awd, static_args=("penalty",))(rate=lambda count: 0.25, penalty=penalty)
    got, _ = scheduled.update(u, scheduled.init(params), moved)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-6), got, expected)


@every_penalty
@pytest.mark.parametrize("jitted", [False, True])
def test_the_anchor_survives_donation_of_the_parameters(penalty, jitted):
    tx = optax.chain(optax.sgd(0.05), awd(0.1, penalty=penalty))
    params, kept = tree(), jax.tree.map(np.asarray, tree())
    state = (jax.jit(tx.init) if jitted else tx.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        params, state = step(params, state, tree(i))
    jax.tree.map(np.testing.assert_array_equal, optax.tree_utils.tree_get(state, "anchor"), kept)


@every_penalty
def test_an_averaged_anchor_follows_the_weights(penalty):
    """Every update is pulled to the anchor before it, and the anchor then moves a tenth of the way to the weights."""
    tx, theta = awd(0.1, penalty=penalty, ema_decay=0.9), np.random.default_rng(0).standard_normal(50)
    params = {"w": jnp.asarray(theta, jnp.float32)}
    state, anchor = tx.init(params), theta
    update = jax.jit(tx.update)
    for seed in range(5):
        step = np.random.default_rng(seed + 1).standard_normal(50)
        updates, state = update({"w": jnp.asarray(step, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        theta = reference(theta, step, anchor, 0.1, penalty)
        anchor = 0.9 * anchor + 0.1 * theta
        np.testing.assert_allclose(params["w"], theta, atol=1e-5)
        np.testing.assert_allclose(state.anchor["w"], anchor, atol=1e-5)
    assert state.anchor["w"].dtype == jnp.float32 and update._cache_size() == 1


@pytest.mark.parametrize("average", [1.0, -0.1, float("nan")])
def test_averages_outside_the_range_are_refused(average):
    with pytest.raises(ValueError, match=r"ema_decay is .*in \[0, 1\)"):
        awd(0.1, ema_decay=average)


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, float("nan")])
def test_l2_rates_outside_the_range_are_refused(rate):
    with pytest.raises(ValueError, match=r"rate is .* with penalty 'l2': it is the fraction"):
        awd(rate)


def test_other_bad_arguments_are_refused():
    awd(3.0, penalty="l1")
    with pytest.raises(ValueError, match="rate is -1"):
        awd(-1.0, penalty="l1")
    with pytest.raises(ValueError, match="'l2', 'l1'"):
        awd(0.1, penalty="L2")
    tx = awd(0.1)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        tx.update(tree(), tx.init(tree()))


# Leaves and trees of every kind, and inject_hyperparams.

ARITHMETICS = ("float32", "param")


def updated(tx, params, updates, anchor=None, *, jit=True):
    state = tx.init(params if anchor is None else anchor)
    return (jax.jit(tx.update) if jit else tx.update)(updates, state, params)


def bias_alone(params):
    return jax.tree.map(lambda x: x.ndim == 1, params)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int16"])
def test_whole_numbers_are_pulled_and_their_updates_leave_as_floats(dtype, arithmetic):
    anchor, params, u = ({"n": jnp.array([x, 3], dtype)} for x in (10, 15, 1))
    updates, state = updated(awd(0.25, arithmetic=arithmetic), params, u, anchor)
    assert updates["n"].tolist() == [1 - 0.25 * 6, 3 - 0.25 * 3] and updates["n"].dtype == jnp.float32
    assert state.anchor["n"].dtype == dtype
    assert optax.apply_updates(params, updates)["n"].tolist() == [14, 5]  # as optax cuts them off
    plain, _ = updated(optax.add_decayed_weights(0.25), params, u)
    assert plain["n"].dtype == updates["n"].dtype


def test_a_counter_that_no_one_moved_stays_whatever_the_dtype_of_the_anchor():
    params = {"w": jnp.ones(2), "count": jnp.array(1_000_001)}
    updates, state = updated(awd(0.5, anchor_dtype=jnp.bfloat16), params, {"w": jnp.ones(2), "count": jnp.array(0)})
    assert updates["count"] == 0 and state.anchor["count"] == 1_000_001
    assert state.anchor["w"].dtype == jnp.bfloat16 and updates["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", [float, int, np.float64, np.float32])
@pytest.mark.parametrize("penalty", ["l2", "l1"])
def test_plain_numbers(kind, penalty):
    params, anchor = {"w": kind(4), "b": [kind(1)]}, {"w": kind(2), "b": [kind(1)]}
    updates, _ = updated(awd(0.5, penalty=penalty), params, {"w": kind(2), "b": [kind(0)]}, anchor, jit=False)
    assert updates["w"] == (0.0 if penalty == "l2" else 1.5) and updates["b"] == [0.0]


def test_booleans_stay():
    params = {"on": jnp.array([True, False]), "off": False}
    updates, _ = updated(awd(0.5), params, jax.tree.map(jnp.zeros_like, params))
    after = optax.apply_updates(params, updates)
    assert after["on"].tolist() == [True, False] and not after["off"]


@pytest.mark.parametrize("penalty", ["l2", "l1"])
def test_complex_numbers_are_pulled_as_pairs_of_real_ones(penalty):
    anchor, params, u = ({"w": jnp.array([x], jnp.complex64)} for x in (1 + 1j, 2 - 1j, 1 + 1j))
    tx = awd(0.25, penalty=penalty)
    pair = optax.contrib.split_real_and_imaginary(tx)
    (updates, _), (expected, _) = (updated(t, params, u, anchor) for t in (tx, pair))
    assert updates["w"].dtype == jnp.complex64
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert updates["w"][0] == (0.5 + 1.25j if penalty == "l2" else 0.75 + 1.25j)
    real, _ = updated(tx, params, {"w": jnp.ones(1)}, anchor)
    assert real["w"].dtype == jnp.complex64 and real["w"].imag[0] > 0


def test_where_an_update_is_none_it_stays_none():
    params = {"w": jnp.ones(2), "frozen": jnp.full(2, 5.0), "absent": None}
    updates = {"w": jnp.ones(2), "frozen": None, "absent": None}
    for tx in (awd(0.5), awd(0.5, ema_decay=0.9), optax.chain(optax.sgd(-1.0), awd(0.5))):
        result, state = updated(tx, params, updates)
        assert result["w"].tolist() == [0.5, 0.5] and result["frozen"] is result["absent"] is None
        assert optax.tree_utils.tree_get(state, "anchor")["frozen"].tolist() == [5.0, 5.0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    weight: jax.Array
    bias: jax.Array | None
    width: int = dataclasses.field(metadata={"static": True})


@pytest.mark.parametrize(
    "params",
    [
        {},
        (),
        [jnp.zeros((0, 3))],
        {"a": optax.MaskedNode(), "b": jnp.ones(2)},
        {"a": optax.EmptyState(), "b": (jnp.ones(2), None)},
        Layer(jnp.ones((2, 3)), None, 3),
        [Layer(jnp.ones((2, 3)), jnp.ones(3), 3)],
        jnp.ones(3),
    ],
    ids=["{}", "()", "no rows", "MaskedNode", "EmptyState", "module", "modules", "array"],
)
def test_trees_keep_their_structure(params):
    u = jax.tree.map(jnp.ones_like, params)
    expected, _ = updated(optax.add_decayed_weights(0.5), params, u)
    updates, _ = updated(awd(0.5), params, u)
    assert jax.tree.structure(updates) == jax.tree.structure(expected) == jax.tree.structure(params)
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("ema_decay", [0.9, lambda count: jnp.where(count == 0, 0.9, 0.5)], ids=["number", "schedule"])
def test_inject_hyperparams_with_an_anchor_that_follows(ema_decay, jit):
    """The anchor is still where it began at the first update, and after it a tenth of the way to the weights."""
    tx = optax.inject_hyperparams(awd)(rate=0.5, ema_decay=ema_decay)
    params, u = {"w": jnp.full(2, 3.0)}, {"w": jnp.ones(2)}
    state = tx.init({"w": jnp.ones(2)})
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(u, state, params)
    assert updates["w"].tolist() == [-0.5, -0.5]
    np.testing.assert_allclose(state.inner_state.anchor["w"], 1 + 0.1 * 1.5, atol=1e-6)
    _, state = update(u, state, optax.apply_updates(params, updates))
    assert "ema_decay" in state.hyperparams


def test_a_rate_is_changed_under_jit_without_another_compilation():
    tx = optax.inject_hyperparams(awd, static_args="mask")(rate=0.5, ema_decay=0.9, mask=bias_alone)
    params, u = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    state, update = tx.init(params), jax.jit(tx.update)
    for rate in (0.5, 0.25, 0.0):
        state.hyperparams["rate"] = jnp.float32(rate)
        updates, _ = update(u, state, params)
        assert updates["b"].tolist() == [1 - rate, 1 - rate] and updates["w"].tolist() == [[1, 1], [1, 1]]
    assert update._cache_size() == 1


MASKS = {
    "vectors": bias_alone,
    "scalars": lambda params: jax.tree.map(lambda x: x.ndim == 0, params),
    "by name": lambda params: jax.tree.map_with_path(lambda path, x: "b" in jax.tree_util.keystr(path), params),
    "by value": lambda params: jax.tree.map(lambda x: x.sum() > 0, params),
}


def factory_of(mask, **static):
    return optax.inject_hyperparams(lambda rate, mask: awd(rate, mask=mask), **static)(rate=0.5, mask=mask)


@pytest.mark.parametrize("mask", MASKS)
def test_inject_hyperparams_with_a_callable_mask(mask):
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    mask = MASKS[mask]
    expected, _ = updated(awd(0.5, mask=mask), params, params, jit=False)
    injected, partial = (optax.inject_hyperparams(make) for make in (awd, functools.partial(awd, penalty="l2")))
    static = optax.inject_hyperparams(awd, static_args="mask")
    for tx in (injected(rate=0.5, mask=mask), partial(0.5, mask=mask), static(0.5, mask=mask)):
        updates, _ = updated(tx, params, params, jit=False)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    updates, _ = updated(factory_of(mask, static_args="mask"), params, params, jit=False)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    with pytest.raises(ValueError, match=r"mask is (True|False): it must be a tree .* static_args='mask'"):
        factory_of(mask).init(params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.dtype("bfloat16"), None], ids=repr)
def test_inject_hyperparams_with_a_dtype_of_the_anchor(dtype):
    params = {"w": jnp.ones(2)}
    for static in ((), "anchor_dtype"):
        tx = optax.inject_hyperparams(awd, static_args=static)(rate=0.5, anchor_dtype=dtype)
        assert tx.init(params).inner_state.anchor["w"].dtype == (dtype or jnp.float32)


@pytest.mark.parametrize("ema_decay", [1.5, lambda count: 2.0])
def test_an_average_out_of_range_is_refused_through_inject_hyperparams_too(ema_decay):
    with pytest.raises(ValueError, match=r"ema_decay is .*in \[0, 1\)"):
        optax.inject_hyperparams(awd)(rate=0.5, ema_decay=ema_decay).init({"w": jnp.ones(2)})


def test_an_anchor_that_follows_whole_numbers_is_kept_as_floats():
    params = {"n": jnp.array(10)}
    tx = awd(0.0, ema_decay=0.75)
    _, state = updated(tx, {"n": jnp.array(13)}, {"n": jnp.array(0)}, params)
    assert state.anchor["n"] == 10.75


# Each row of the table in the docstring, against its fixed point.

ALPHA, PULL, TARGET = 0.1, 0.25, 3.0
FREE = 1 + ALPHA * (1 - PULL) / PULL  # from the anchor 1, with the gradient −1: Δ = (1 − pull)(Δ + α)
WEIGHTS = {"w": jnp.ones(2)}
PAIR = optax.LookaheadParams.init_synced(WEIGHTS)


def pull():
    return awd(PULL)


def sgd():
    return optax.sgd(ALPHA)


def both():
    return optax.chain(sgd(), pull())


def masked(inner):
    """Every third step, the first included."""
    return optax.conditionally_mask(inner, lambda step: step % 3 == 0)


def adversary():
    return optax.chain(contrib.normalize(), optax.sgd(0.05))


def multi_steps(inner):
    return optax.MultiSteps(inner, 4).gradient_transformation()


def evaluated(state, params):
    return contrib.schedule_free_eval_params(state, params)


def end(tx, params=WEIGHTS, weights=lambda _, params: params, steps=400, gradient=lambda w: -jnp.ones_like(w), loss=()):
    """The first of the weights that are evaluated, in the end; `loss` names the extra arguments that are the loss."""

    def step(carry, _):
        params, state = carry
        fast = getattr(params, "fast", params)
        more = dict.fromkeys(loss, -jnp.sum(fast["w"]))
        updates, state = tx.update(jax.tree.map(gradient, fast), state, params, **more)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, tx.init(params)))
    return float(weights(state, params)["w"][0])


RIGHT = {
    "schedule_free": (contrib.schedule_free(both(), ALPHA), {"weights": evaluated}),
    "schedule_free in MultiSteps": (
        multi_steps(contrib.schedule_free(both(), ALPHA)),
        {"weights": lambda state, params: evaluated(state.inner_opt_state, params), "steps": 1600},
    ),
    "lookahead, slow": (optax.lookahead(both(), 3, 0.5), {"params": PAIR, "weights": lambda _, pair: pair.slow}),
    "lookahead, fast": (optax.lookahead(both(), 3, 0.5), {"params": PAIR, "weights": lambda _, pair: pair.fast}),
    "MultiSteps": (multi_steps(both()), {}),
    "sam": (contrib.sam(both(), adversary()), {}),
    "apply_if_finite inside": (optax.apply_if_finite(both(), 5), {}),
    "apply_if_finite after": (optax.chain(optax.apply_if_finite(sgd(), 5), pull()), {}),
    "conditionally_mask inside": (masked(both()), {"steps": 1200}),
    "masked inside": (optax.masked(both(), {"w": True}), {}),
    "masked after": (optax.chain(optax.masked(sgd(), {"w": True}), pull()), {}),
    "partition inside": (optax.partition({"a": both()}, {"w": "a"}), {}),
    "multi_transform after": (optax.chain(optax.multi_transform({"a": sgd()}, {"w": "a"}), pull()), {}),
    "selective_transform inside": (optax.selective_transform(both(), freeze_mask={"w": False}), {}),
    "flatten inside": (optax.flatten(both()), {}),
    "flatten after": (optax.chain(optax.flatten(sgd()), pull()), {}),
    "named_chain": (optax.named_chain(("step", sgd()), ("pull", pull())), {}),
    "split_real_and_imaginary": (contrib.split_real_and_imaginary(both()), {}),
    "clip": (optax.chain(optax.clip(2.0), sgd(), optax.clip_by_global_norm(1.0), pull()), {}),
    "ema": (optax.chain(sgd(), optax.ema(0.9), pull()), {}),
    "reduce_on_plateau": (optax.chain(sgd(), contrib.reduce_on_plateau(patience=10_000), pull()), {"loss": ["value"]}),
    "lbfgs": (optax.chain(optax.lbfgs(ALPHA, linesearch=None), pull()), {}),
    "polyak_sgd": (optax.chain(optax.polyak_sgd(ALPHA, f_min=-1e9), pull()), {"loss": ["value"]}),
    "keep_params_nonnegative": (optax.chain(sgd(), pull(), optax.keep_params_nonnegative()), {}),
    "freeze": (optax.chain(sgd(), pull(), optax.freeze({"w": False})), {}),
    "inject_hyperparams": (optax.chain(sgd(), optax.inject_hyperparams(awd)(rate=PULL)), {}),
    "inject_hyperparams around": (
        optax.inject_hyperparams(lambda rate: optax.chain(sgd(), awd(rate)))(rate=PULL),
        {},
    ),
}


@pytest.mark.parametrize("place", RIGHT)
def test_the_place_of_the_table_has_the_fixed_point(place):
    tx, options = RIGHT[place]
    assert end(tx, **options) == pytest.approx(FREE, abs=1e-3)


def runs_away(weights):
    return not abs(weights) < 3.0


def stays_short(weights):
    return weights < FREE - 0.05


WRONG = {
    "schedule_free_sgd, after": (
        optax.chain(contrib.schedule_free_sgd(ALPHA), pull()),
        {"weights": lambda state, params: evaluated(state[0], params)},
        runs_away,
    ),
    "schedule_free_adamw, after": (
        optax.chain(contrib.schedule_free_adamw(ALPHA), pull()),
        {"weights": lambda state, params: evaluated(state[0], params)},
        runs_away,
    ),
    "lookahead, reset_state=True": (
        optax.lookahead(both(), 3, 0.5, reset_state=True),
        {"params": PAIR, "weights": lambda _, pair: pair.slow},
        runs_away,
    ),
    "MultiSteps, after": (optax.chain(multi_steps(sgd()), pull()), {}, stays_short),
    "apply_every": (optax.chain(optax.apply_every(4), sgd(), pull()), {}, lambda weights: abs(weights - FREE) > 0.1),
    "conditionally_mask, after": (optax.chain(masked(sgd()), pull()), {}, stays_short),
    "a sign after it": (optax.chain(pull(), optax.scale_by_learning_rate(ALPHA)), {}, runs_away),
    "cocob": (
        optax.chain(contrib.cocob(), pull()),
        {"params": {"w": jnp.array([1.0, 1.1])}, "gradient": lambda w: w - TARGET},
        lambda weights: abs(weights - TARGET) < 0.01,  # as if nothing pulled
    ),
}

if hasattr(contrib, "madgrad"):  # optax 0.2.8 has it, 0.2.6 has not
    WRONG["madgrad"] = optax.chain(contrib.madgrad(ALPHA), pull()), {}, runs_away


@pytest.mark.parametrize("place", WRONG)
def test_what_the_table_warns_of_is_so(place):
    tx, options, expected = WRONG[place]
    assert expected(end(tx, **options))


def test_every_name_of_optax_in_these_rows_is_in_the_docstring():
    words = set(inspect.getdoc(awd).translate(str.maketrans("(),.", "    ")).split())
    names = {place.split(",")[0].split()[0] for place in (*RIGHT, *WRONG)} - {"a"}
    assert len(names) > 20 and names <= words


@pytest.mark.parametrize("fast", [sgd(), optax.adam(0.1), optax.lion(0.1)])
def test_after_lookahead_it_is_refused(fast):
    tx = optax.chain(optax.lookahead(fast, 3, 0.5), pull())
    with pytest.raises(ValueError, match=r"put the decay inside, lookahead\(chain\("):
        tx.init(PAIR)
    with pytest.raises(ValueError, match=r"put the decay inside, lookahead\(chain\("):
        pull().update(PAIR, pull().init(WEIGHTS), PAIR)


def test_inside_sam_the_adversary_is_not_pulled():
    """On ½(w − 3)² the gradient is that of a point 0.05 uphill, and Δ = (1 − pull)(Δ + α(3 − 1 + 0.05 − Δ))."""
    step = ALPHA * (1 - PULL)
    expected = 1 + step * (TARGET - 1 + 0.05) / (PULL + step)
    one, uphill = {"w": jnp.ones(1)}, lambda w: w - TARGET
    inside = contrib.sam(both(), adversary())
    after = optax.chain(contrib.sam(sgd(), adversary()), pull())
    assert end(inside, one, gradient=uphill) == pytest.approx(expected, abs=1e-4)
    assert end(after, one, gradient=uphill) != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_that_is_not_finite_is_pulled_after_apply_if_finite_and_not_inside(inside):
    tx = optax.apply_if_finite(both(), 5) if inside else optax.chain(optax.apply_if_finite(sgd(), 5), pull())
    state = tx.init(WEIGHTS)
    updates, _ = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, {"w": jnp.full(2, 2.0)})
    assert updates["w"].tolist() == ([0.0, 0.0] if inside else [-PULL, -PULL])


def test_conditionally_transform_pulls_at_its_steps_alone():
    tx = optax.chain(sgd(), optax.conditionally_transform(pull(), lambda step: (step + 1) % 2 == 0))
    params, state, seen = WEIGHTS, tx.init(WEIGHTS), []
    for _ in range(4):
        updates, state = tx.update({"w": -jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0]))
    assert seen == pytest.approx([1.1, 1.15, 1.25, 1.2625])


OTHERS = {
    optax: "adabelief adadelta adafactor adagrad adamax adamaxw adan amsgrad fromage lamb lars nadam nadamw novograd "
    "optimistic_adam_v2 optimistic_gradient_descent radam rmsprop sign_sgd signum sm3 yogi",
    contrib: "acprop ademamix adopt dog dowg galore muon simplified_ademamix",
}


LATER = ("signum", "galore")  # than the lowest optax that is allowed
KNOWN = [
    getattr(module, name)
    for module, names in OTHERS.items()
    for name in names.split()
    if name not in LATER or hasattr(module, name)
]


@pytest.mark.parametrize("make", KNOWN)
def test_after_every_optimizer_without_weights_of_its_own(make):
    """Where its last step u no longer moves the weights: Δ = u (1 − pull)/pull."""
    rate = {"learning_rate": ALPHA} if "learning_rate" in inspect.signature(make).parameters else {}
    last = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))
    tx, params = optax.chain(make(**rate), last, pull()), {"w": jnp.ones((2, 2))}
    seen = end(
        tx, params, lambda state, params: {"w": (params["w"] - state[1]["w"] * (1 - PULL) / PULL)[0]}, steps=1000
    )
    assert seen == pytest.approx(1.0, abs=0.03)
