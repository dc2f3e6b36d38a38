"""The kernels of GPUs and TPUs make the bits that the programs of a CPU make; interpreted here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core import one_pass
from es_jax.core.mesh import make_mesh
from es_jax.es.low_rank import LowRankNoise
from es_jax.es.noise import GaussianNoise, SharedSeedNoise
from es_jax.es.population import Population
from es_jax.models.sharding import param_shardings
from es_jax.training import state
from es_jax.training.config import freeze
from es_jax.training.one_pass_update import takes_one_pass, update_in_one_pass

SHAPES = {  # of a block and less, of several, of none that is whole; rows and columns of a TPU turned round and not
    "embed": {"embedding": (272, 24)},
    "layers": {
        "attn": {"o": {"kernel": (3, 128, 8)}, "q": {"bias": (3, 40), "kernel": (3, 24, 40)}},
        "mlp_norm": {"scale": (3, 24)},
    },
    "final_norm": {"scale": (24,)},
}
L2 = {"penalty": "l2", "strength": 0.1}
every_platform = pytest.mark.parametrize("platform", [one_pass.GPU, one_pass.TPU])


def numbers(shift, dtype=jnp.float32):
    draw = np.random.default_rng(7).standard_normal
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(shape) + shift, dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def both(platform, mesh, optim, es, dtype=jnp.float32):
    """What a CPU's program makes of a step, and what the interpreted kernels make of it."""
    config = freeze({"es": {"population": 6, **es}, "optim": optim})
    params = jax.device_put(numbers(0, dtype), param_shardings(mesh, numbers(0, dtype)))
    spec = state.UpdateSpec.of(config)
    opt_state = state.transformation(spec.chain, mesh, params).init(numbers(0.1, dtype))
    start = None if state.anchor_stays(config) else numbers(0.2, dtype)
    members = Population(6, seed=3, antithetic=config.es.antithetic).members(1)
    arguments = params, opt_state, start, members, jnp.linspace(-1, 1.5, 6), jnp.float32([0.05, 0.005])
    assert takes_one_pass(spec.noise, spec.chain)
    kernels = functools.partial(update_in_one_pass, spec.noise, spec.chain, mesh, platform=platform, interpret=True)
    with jax.numpy_dtype_promotion("standard"):  # optax's adam needs it
        return jax.jit(functools.partial(state.update, spec, mesh))(*arguments), jax.jit(kernels)(*arguments)


@pytest.mark.parametrize(
    ("platform", "groups", "model", "optim", "es"),
    [
        (one_pass.GPU, 1, 1, {"anchor": L2}, {}),
        (one_pass.TPU, 1, 1, {"anchor": L2}, {}),
        (one_pass.GPU, 2, 4, {"anchor": L2}, {"antithetic": True}),
        (one_pass.TPU, 4, 2, {"anchor": {"penalty": "l1", "strength": 0.1}}, {}),
        (one_pass.GPU, 1, 1, {"name": "lion", "anchor": L2 | {"ema_decay": 0.9}}, {}),
        (one_pass.TPU, 2, 1, {"name": "momentum"}, {}),
    ],
)
def test_an_update_in_one_pass_has_the_bits_of_the_update(platform, groups, model, optim, es):
    expected, got = both(platform, make_mesh(groups, model), optim, es)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(expected[:2]), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert got[2].shape == (groups, model)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "tolerance"), [(one_pass.GPU, jnp.float32, 1e-6), (one_pass.TPU, jnp.bfloat16, 1e-2)]
)
def test_moments_and_weights_of_16_bits_are_near_those_of_the_update(platform, dtype, tolerance):
    """Adam's own sums are rounded as the compiler likes."""
    expected, got = both(platform, make_mesh(1, 1), {"name": "adamw", "anchor": L2}, {}, dtype)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance)


def test_what_needs_more_than_its_own_element_takes_several_passes():
    chain = state.UpdateSpec.of(freeze({})).chain
    assert takes_one_pass(GaussianNoise(), chain)
    assert not takes_one_pass(GaussianNoise(), dataclasses.replace(chain, max_grad_norm=1.0))
    for noise in (GaussianNoise("threefry"), SharedSeedNoise(), LowRankNoise()):
        assert not takes_one_pass(noise, chain)


@every_platform
@pytest.mark.parametrize("shape", [(5,), (1024,), (7, 300), (3, 40, 130), (2, 136, 8)])
def test_every_element_is_read_once_with_its_index(platform, shape):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    offset = range(3, 3 + len(shape))

    def function(index, scalars, elements):
        place = sum(1000**axis * along.astype(jnp.int32) for axis, along in enumerate(index))
        return [place + jnp.zeros(elements[0].shape, jnp.int32), elements[0] * scalars[0][1]], [
            jnp.ones(elements[0].shape, jnp.float32)
        ]

    call = functools.partial(
        one_pass.one_pass, function, [jnp.float32([9, 2])], [x], [jnp.int32, jnp.float32],
        offset=offset, platform=platform, sums=1, interpret=True,
    )  # fmt: skip
    (place, doubled), (count,) = call()
    index = np.indices(shape)
    expected = sum(1000**axis * (along + first) for (axis, along), first in zip(enumerate(index), offset, strict=True))
    np.testing.assert_array_equal(place, expected)
    np.testing.assert_array_equal(doubled, 2 * x)
    assert count == x.size
