"""The anchored decay in nnx.Optimizer, and an anchor with shardings of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from es_jax.core.mesh import make_mesh
from es_jax.optim.anchored import anchored_weight_decay as awd


def updated(tx, params, updates, anchor=None, *, jit=True):
    state = tx.init(params if anchor is None else anchor)
    return (jax.jit(tx.update) if jit else tx.update)(updates, state, params)


def bias_alone(params):
    return jax.tree.map(lambda x: x.ndim == 1, params)


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
