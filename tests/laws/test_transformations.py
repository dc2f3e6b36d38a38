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
