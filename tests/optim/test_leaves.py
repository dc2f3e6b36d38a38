"""The anchored decay on leaves of every kind, in trees of every kind, and under inject_hyperparams."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from es_jax.core.mesh import make_mesh
from es_jax.optim.anchored import anchored_weight_decay as awd

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


class Model(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(1))
        self.count = nnx.Param(jnp.array(3))


NNX = {
    "fixed": ({}, 0.3),
    "mask": ({"mask": bias_alone}, {"kernel": 5.0, "bias": 0.3}),
    "narrow": ({"anchor_dtype": jnp.bfloat16}, 0.3),
    "followed": ({"ema_decay": 0.5}, None),
}


@pytest.mark.parametrize("kind", NNX)
def test_an_nnx_optimizer(kind):
    """α 0.1, pull 0.25, gradient −1: 0.3 from the anchor in the end; where nothing pulls, 5 after 50 steps."""
    options, expected = NNX[kind]
    model = Model()
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), awd(0.25, **options)), wrt=nnx.Param)
    before = jax.tree.map(jnp.array, nnx.as_pure(nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(lambda x: -jnp.ones_like(x), nnx.state(model, nnx.Param)))

    for _ in range(50):
        step(model, optimizer)
    moved = jax.tree.map(lambda a, b: b - a, before, nnx.as_pure(nnx.state(model, nnx.Param)))
    for name in ("kernel", "bias"):
        distance = expected[name] if isinstance(expected, dict) else expected
        if distance is None:
            assert (moved["linear"][name] > 1.5).all()  # an anchor that follows does not hold
        else:
            np.testing.assert_allclose(moved["linear"][name], distance, atol=0.01)


def test_a_state_of_nnx_is_a_tree_like_any_other():
    _, state, _ = nnx.split(Model(), nnx.Param, ...)
    updates, _ = updated(awd(0.5), state, jax.tree.map(jnp.ones_like, state))
    assert jax.tree.structure(updates) == jax.tree.structure(state)
    assert isinstance(updates["linear"]["bias"], nnx.Param)


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
    with pytest.raises(ValueError, match=r"mask is (True|False): it must be a tree .* say static_args='mask'"):
        factory_of(mask).init(params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.dtype("bfloat16"), None], ids=repr)
def test_inject_hyperparams_with_a_dtype_of_the_anchor(dtype):
    params = {"w": jnp.ones(2)}
    for static in ((), "anchor_dtype"):
        tx = optax.inject_hyperparams(awd, static_args=static)(rate=0.5, anchor_dtype=dtype)
        assert tx.init(params).inner_state.anchor["w"].dtype == (dtype or jnp.float32)


@pytest.mark.parametrize("ema_decay", [1.5, lambda count: 2.0])
def test_an_average_out_of_range_is_refused_through_inject_hyperparams_too(ema_decay):
    with pytest.raises(ValueError, match=r"ema_decay is .*must be in \[0, 1\)"):
        optax.inject_hyperparams(awd)(rate=0.5, ema_decay=ema_decay).init({"w": jnp.ones(2)})


def test_an_anchor_that_follows_whole_numbers_is_kept_as_floats():
    params = {"n": jnp.array(10)}
    tx = awd(0.0, ema_decay=0.75)
    _, state = updated(tx, {"n": jnp.array(13)}, {"n": jnp.array(0)}, params)
    assert state.anchor["n"] == 10.75


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_shardings_of_the_anchor_are_a_tree_or_a_prefix_beside_a_mask(memory):
    place = NamedSharding(make_mesh(), PartitionSpec(), memory_kind=memory)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    shardings = [place, {"w": place, "b": place}, {"w": place, "b": NamedSharding(make_mesh(), PartitionSpec())}]
    for sharding in shardings:
        for mask in (None, bias_alone, {"w": True, "b": False}):
            updates, _ = updated(awd(0.5, mask=mask, anchor_sharding=sharding), params, params)
            expected, _ = updated(awd(0.5, mask=mask), params, params)
            jax.tree.map(np.testing.assert_array_equal, updates, expected)
