"""optax's laws, and the definition, for the anchored decay after every optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from es_jax.core.mesh import make_mesh
from es_jax.optim.anchored import anchored_weight_decay as awd
from es_jax.optim.chains import OPTIMIZERS

PENALTIES = ("l2", "l1")
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture(autouse=True)
def promotion(request):
    """optax's own adam and lion need implicit promotion; everything else here runs without it."""
    optimizer = request.node.callspec.params.get("optimizer") if hasattr(request.node, "callspec") else None
    with jax.numpy_dtype_promotion("standard" if optimizer in ("adam", "adamw", "lion") else "strict"):
        yield


def tree(seed=0, dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(a, (8, 16), dtype), "b": {"c": jax.random.normal(b, (24,), dtype)}}


def chain(optimizer, penalty, rate=0.1):
    return optax.chain(OPTIMIZERS[optimizer](0.05), awd(rate, penalty=penalty))


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
@every_optimizer
def test_after_every_optimizer(optimizer, penalty):
    """The chain ends where its optimizer's own step, pulled as defined, ends; over several steps."""
    params = start = tree()
    tx, plain = chain(optimizer, penalty), OPTIMIZERS[optimizer](0.05)
    state, plain_state = tx.init(params), plain.init(params)
    for step in range(4):
        gradient = tree(step + 1)
        u, plain_state = plain.update(gradient, plain_state, params)
        expected = jax.tree.map(
            lambda p, u, a: reference(np.float64(p), np.float64(u), np.float64(a), 0.1, penalty),
            params,
            u,
            start,
        )
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, atol=1e-6), params, expected)


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
@every_optimizer
def test_jit_scan_and_vmap(optimizer, penalty):
    tx, params = chain(optimizer, penalty), tree()

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    gradients = [tree(i) for i in (1, 2, 3)]
    carry = (params, tx.init(params))
    for gradient in gradients:
        carry, _ = step(carry, gradient)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    (scanned, _), _ = jax.jit(functools.partial(jax.lax.scan, step))((params, tx.init(params)), stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, carry[0])

    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    gradient = jax.tree.map(lambda x: jnp.stack([x, -x]), gradients[0])
    (out, _), _ = jax.vmap(lambda p, g: step((p, tx.init(p)), g))(several, gradient)
    (alone, _), _ = step((params, tx.init(params)), gradients[0])
    jax.tree.map(lambda o, a: np.testing.assert_allclose(o[0], a, atol=1e-6), out, alone)


@every_penalty
@pytest.mark.parametrize("jitted", [False, True])
def test_the_anchor_survives_donation_of_the_parameters(penalty, jitted):
    tx = chain("sgd", penalty)
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
@every_optimizer
def test_extra_args_dtypes_shardings_and_no_recompilation(optimizer, penalty):
    mesh = make_mesh()
    sharding = NamedSharding(mesh, PartitionSpec(("groups", "model")))
    tx = chain(optimizer, penalty)
    params = jax.device_put(tree(dtype=jnp.bfloat16), sharding)
    state = jax.jit(tx.init)(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
    gradient = jax.device_put(tree(1, jnp.bfloat16), sharding)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    updates, state = update(gradient, state, params)
    updates, state = update(gradient, state, params)  # the first call may still settle shardings
    compiled = update._cache_size()
    where = jax.tree.map(lambda x: x.sharding, state)
    for _ in range(2):
        updates, state = update(gradient, state, params)
    assert update._cache_size() == compiled
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    same = jax.tree.map(lambda x, w: x.sharding.is_equivalent_to(w, x.ndim), state, where)
    assert all(jax.tree.leaves(same))
    anchor = optax.tree_utils.tree_get(state, "anchor")
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(anchor))


def test_anchor_dtype_and_sharding():
    sharding = NamedSharding(make_mesh(), PartitionSpec(("groups", "model")))
    state = awd(0.1, anchor_dtype=jnp.bfloat16, anchor_sharding=sharding).init(tree())
    for leaf in jax.tree.leaves(state.anchor):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding == sharding
    updates, _ = awd(0.1).update(tree(1), state, tree(2))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))


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
    with pytest.raises(ValueError, match=r"ema_decay is .* must be in \[0, 1\)"):
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


def test_it_can_be_lifted_out_as_one_file():
    import ast
    import inspect

    from es_jax.optim import anchored

    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(anchored))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        imported |= {name.split(".")[0] for name in names}
    assert imported <= {"jax", "optax", "typing", "collections", "inspect"}
