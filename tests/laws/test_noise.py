"""The laws that every kind of noise obeys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from es_jax.core import rng
from es_jax.core.mesh import GROUPS, MODEL, make_mesh
from es_jax.core.tree import named_leaves
from es_jax.es.low_rank import LowRankNoise
from es_jax.es.noise import NOISES, GaussianNoise, SharedSeedNoise
from es_jax.es.population import Population
from es_jax.models.sharding import param_shardings

PARAMS = {
    "embed": jnp.linspace(-1, 1, 48 * 40).reshape(48, 40),
    "layers": {"a": jnp.ones((3, 40, 24)), "b": jnp.zeros((3, 40, 24)), "norm": jnp.ones((3, 40))},
    "odd": jnp.zeros((17, 40)),
    "scalar": jnp.float32(1.0),
}
RULES = [
    ("embed", PartitionSpec(MODEL, GROUPS)),
    ("layers/[ab]", PartitionSpec(None, GROUPS, MODEL)),
    ("", PartitionSpec()),
]
FULL = {name: make() for name, make in NOISES.items()} | {"threefry": GaussianNoise("threefry")}
LOW = {f"rank_{rank}": LowRankNoise(rank=rank, stacked="layers/") for rank in (1, 4)}
KINDS = FULL | LOW
every_noise = pytest.mark.parametrize("noise", KINDS.values(), ids=KINDS)
every_low_rank = pytest.mark.parametrize("noise", LOW.values(), ids=LOW)


def eps(noise, member, params=PARAMS):
    """ε itself, drawn as the difference of two members far enough apart for float32."""
    zero = jax.tree.map(jnp.zeros_like, params)
    return noise.apply(zero, member, sigma=1.0)


def brute_force(noise, members, weights, params=PARAMS):
    total = jax.tree.map(lambda x: np.zeros(x.shape), params)
    for member, weight in zip(members, np.asarray(weights, np.float64), strict=True):
        total = jax.tree.map(lambda t, e, w=weight: t + w * np.asarray(e, np.float64), total, eps(noise, member))
    return jax.tree.map(lambda t: -t / len(members), total)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


@every_noise
@pytest.mark.parametrize("antithetic", [False, True])
def test_estimate_equals_the_brute_force_sum(noise, antithetic):
    members = Population(6, seed=3, antithetic=antithetic).members(1)
    weights = jax.random.normal(jax.random.key(0), (6,))
    got, expected = noise.estimate(PARAMS, members, weights), brute_force(noise, members, weights)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=2e-6), got, expected)


@every_noise
@pytest.mark.parametrize("antithetic", [False, True])
def test_same_bits_on_1_2_4_and_8_devices(noise, antithetic):
    members = Population(6, seed=3, antithetic=antithetic).members(1)
    weights = jax.random.normal(jax.random.key(0), (6,))
    estimates, perturbed = [], []
    for n, model in ((1, 1), (2, 1), (4, 1), (4, 2), (8, 1), (8, 4)):
        mesh = make_mesh(None, model, devices=jax.devices()[:n])
        where = param_shardings(mesh, PARAMS, rules=RULES)
        params = jax.device_put(PARAMS, where)
        estimates.append(jax.jit(noise.estimate, out_shardings=where)(params, members, weights))
        apply = jax.jit(lambda p: noise.apply(p, members[1], sigma=0.1), out_shardings=where)
        perturbed.append(apply(params))
    assert all(equal(estimates[0], other) for other in estimates[1:])
    assert all(equal(perturbed[0], other) for other in perturbed[1:])


@pytest.mark.unchecked  # `lower` puts descriptions where arrays stand
@every_noise
def test_estimate_needs_no_communication(noise):
    mesh = make_mesh()
    where = param_shardings(mesh, PARAMS, rules=RULES)
    members = Population(6, seed=3).members(1)
    compiled = jax.jit(noise.estimate, in_shardings=(where, None, None), out_shardings=where).lower(
        PARAMS, members, jnp.ones(6)
    )
    text = compiled.compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


@pytest.mark.unchecked  # `lower` puts descriptions where arrays stand
@every_noise
def test_memory_does_not_grow_with_the_population(noise):
    def temporary(n):
        lowered = jax.jit(noise.estimate).lower(PARAMS, Population(n, seed=0).members(0), jnp.ones(n))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(256) < temporary(16) + 256 * 128


@every_noise
def test_antithetic_pairs_sum_to_zero(noise):
    plus, minus = Population(2, seed=9, antithetic=True).members(0)
    assert equal(eps(noise, plus), jax.tree.map(jnp.negative, eps(noise, minus)))


@pytest.mark.parametrize("noise", FULL.values(), ids=FULL)
def test_moments_and_independence_of_members_and_steps(noise):
    params = {"w": jnp.zeros((400, 500))}
    draws = [
        np.asarray(eps(noise, member, params)["w"], np.float64).ravel()
        for step in (1, 2)
        for member in Population(2, seed=5).members(step)
    ]
    for draw in draws:
        assert abs(draw.mean()) < 5 / len(draw) ** 0.5
        assert abs(draw.var() - 1) < 5 * (2 / len(draw)) ** 0.5
        assert abs((draw**3).mean()) < 5 * (15 / len(draw)) ** 0.5
        assert abs((draw**4).mean() - 3) < 5 * (96 / len(draw)) ** 0.5
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / len(draws[0]) ** 0.5


def test_leaves_are_independent_unless_the_seed_is_shared():
    member = Population(2, seed=0).members(0)[0]
    params = {"a": jnp.zeros(5000), "b": jnp.zeros(5000), "c": jnp.zeros(4000)}
    own, shared = eps(GaussianNoise(), member, params), eps(SharedSeedNoise(), member, params)
    assert abs(np.corrcoef(own["a"], own["b"])[0, 1]) < 0.07
    assert np.array_equal(shared["a"], shared["b"])
    assert abs(np.corrcoef(shared["a"][:4000], shared["c"])[0, 1]) < 0.07


def test_shared_seed_sees_stacked_layers_as_the_parameters_they_are_made_of():
    member = Population(2, seed=0).members(0)[0]
    params = {"layers": {"w": jnp.zeros((3, 4, 5))}, "head": jnp.zeros((4, 5))}
    out = eps(SharedSeedNoise(stacked="layers/"), member, params)
    assert all(np.array_equal(out["layers"]["w"][i], out["head"]) for i in range(3))


@every_noise
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_estimate_is_unbiased_on_a_quadratic(noise, shape):
    """For r(θ) = −|θ − 1|²/2 the estimate, unshaped, is minus the gradient of the reward times σ, in expectation."""
    theta, sigma, n = {"w": jnp.zeros(shape)}, 0.3, 40_000
    members = Population(n, seed=11, antithetic=True).members(0)
    perturbed = jax.vmap(lambda m: noise.apply(theta, m, sigma=sigma))(members)
    rewards = -0.5 * jnp.sum((perturbed["w"] - 1.0).reshape(n, -1) ** 2, axis=1)
    gradient = noise.estimate(theta, members, rewards)["w"] / sigma
    np.testing.assert_allclose(gradient, -np.ones(shape), atol=0.06)


@every_low_rank
def test_entries_of_low_rank_have_mean_0_and_variance_1_and_odd_moments_vanish(noise):
    """Over 8000 layers of 6 × 5: the entries of one matrix are uncorrelated, not independent."""
    params = {"layers/w": jnp.zeros((8000, 6, 5))}
    draw = np.asarray(eps(noise, Population(2, seed=5).members(1)[0], params)["layers/w"], np.float64).reshape(8000, 30)
    fourth = 9 if noise.rank == 1 else 3 + 6 / noise.rank  # E ε⁴ of a sum of r products of normals, over √r
    assert np.abs(draw.mean(0)).max() < 5 / 8000**0.5
    assert np.abs((draw**2).mean(0) - 1).max() < 5 * ((fourth - 1) / 8000) ** 0.5
    assert abs((draw**3).mean()) < 5 * (225 / 8000) ** 0.5  # E ε⁶ of rank 1; 30 entries share 11 numbers
    assert abs((draw**4).mean() - fourth) < 1.0
    product = 1 + 2 / noise.rank  # the variance of that of two entries of a row: E a⁴ = 3 for one rank
    assert np.abs(np.corrcoef(draw.T) - np.eye(30)).max() < 5 * (product / 8000) ** 0.5


@every_low_rank
def test_low_rank_noise_is_independent_between_leaves_layers_members_and_steps(noise):
    params, draws = {"layers/a": jnp.zeros((2, 90, 80)), "b": jnp.zeros((90, 80))}, []
    for step in (1, 2):
        for member in Population(2, seed=5).members(step):
            out = eps(noise, member, params)
            draws += [np.asarray(matrix).ravel() for matrix in (*out["layers/a"], out["b"])]
    assert np.linalg.matrix_rank(draws[0].reshape(90, 80)) == noise.rank
    # a correlation of two matrices is a product of those of their factors, of 90 and 80 numbers each
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 25 / (90 * 80) ** 0.5


def test_vectors_of_low_rank_have_full_noise_or_none():
    member, members = Population(2, seed=0).members(0)[0], Population(6, seed=3).members(1)
    frozen, whole = LowRankNoise(vectors="frozen", stacked="layers/"), LowRankNoise(stacked="layers/")
    full = eps(GaussianNoise(), member)
    assert np.array_equal(eps(whole, member)["layers"]["norm"], full["layers"]["norm"])
    assert np.array_equal(eps(frozen, member)["layers"]["norm"], np.zeros((3, 40)))
    assert not np.asarray(frozen.estimate(PARAMS, members, jnp.arange(6.0))["layers"]["norm"]).any()
    perturbed = {name for name, leaf in named_leaves(PARAMS) if frozen.perturbs(name, leaf)}
    assert perturbed == {"embed", "layers/a", "layers/b", "odd"}


@every_low_rank
def test_members_of_low_rank_are_the_dense_ones(noise):
    members = Population(4, seed=1, antithetic=True).members(0)
    tree = noise.members_of(PARAMS, members, sigma=0.1)
    assert tree["embed"].base is PARAMS["embed"] or np.array_equal(tree["embed"].base, PARAMS["embed"])
    for i, member in enumerate(members):
        dense = noise.apply(PARAMS, member, sigma=0.1)
        for leaf, expected in ((tree["embed"], dense["embed"]), (tree["layers"]["a"], dense["layers"]["a"])):
            own = leaf.base + jnp.einsum("...dr,...fr->...df", leaf.a[i], leaf.b[i])
            np.testing.assert_allclose(own, expected, atol=2e-6)
        assert np.array_equal(tree["layers"]["norm"][i], dense["layers"]["norm"])


def test_an_estimate_of_1024_members_has_the_same_bits_on_every_mesh():
    """With sizes that are no multiple of 8, where a matrix product of all members differs."""
    params = {"w": jnp.zeros((60, 250)), "layers/v": jnp.zeros((3, 36, 52))}
    members, weights = Population(1024, seed=3).members(1), jax.random.normal(jax.random.key(0), (1024,))
    estimates = []
    for n, model in ((1, 1), (2, 1), (2, 2), (4, 2)):
        mesh = make_mesh(None, model, devices=jax.devices()[:n])
        where = {
            "w": NamedSharding(mesh, PartitionSpec(GROUPS, MODEL)),
            "layers/v": NamedSharding(mesh, PartitionSpec(None, GROUPS, MODEL)),
        }
        noise, specs = LowRankNoise(stacked="layers/"), {name: sharding.spec for name, sharding in where.items()}
        estimates.append(jax.jit(noise.estimate, out_shardings=where)(params, members, weights))
        own = functools.partial(noise.estimate, params, specs=specs)
        cut = jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs, check_vma=False)
        estimates.append(jax.jit(cut)(members, weights))
    assert all(equal(estimates[0], other) for other in estimates[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank is 0"), ({"rank": True}, "rank is True"), ({"vectors": "none"}, "frozen")],
)
def test_low_rank_noise_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankNoise(**options)


def test_float32_arithmetic_in_16_bit_leaves_and_one_rounding():
    member = Population(2, seed=0).members(0)[0]
    half = {"w": jnp.full(1000, 0.7, jnp.bfloat16)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    exact = GaussianNoise().apply(wide, member, sigma=1e-3)["w"]
    assert np.array_equal(GaussianNoise().apply(half, member, sigma=1e-3)["w"], exact.astype(jnp.bfloat16))
    assert np.array_equal(
        GaussianNoise().apply(wide, member, sigma=1e-3, dtype=jnp.bfloat16)["w"], exact.astype(jnp.bfloat16)
    )
    members = Population(2, seed=0).members(0)
    assert GaussianNoise().estimate(half, members, jnp.ones(2))["w"].dtype == jnp.float32
    assert SharedSeedNoise().estimate(half, members, jnp.ones(2))["w"].dtype == jnp.bfloat16


def test_the_bits_do_not_depend_on_the_default_generator():
    member = Population(2, seed=0).members(0)[0]
    before = eps(GaussianNoise(), member)
    with jax.default_prng_impl("rbg"):
        again = Population(2, seed=0).members(0)[0]
        assert equal(before, eps(GaussianNoise(), again))


@every_noise
def test_bad_input_is_refused(noise):
    members = Population(2, seed=0).members(0)
    with pytest.raises(ValueError, match="sigma is 0"):
        noise.apply(PARAMS, members[0], sigma=0.0)
    with pytest.raises(TypeError, match="leaf 'steps' has dtype int32"):
        noise.apply({"steps": jnp.zeros(3, jnp.int32)}, members[0], sigma=0.1)
    with pytest.raises(ValueError, match="did you mean"):
        type(noise)("threfry")
    with pytest.raises(ValueError, match="one weight a member"):
        noise.estimate(PARAMS, members, jnp.ones(3))


def test_any_sharding_of_the_users_own():
    """A leaf cut along any axis has the bits of the whole leaf."""
    members, weights = Population(4, seed=1).members(0), jnp.arange(4.0)
    params = {"w": jnp.zeros((16, 8, 24))}
    whole = jax.jit(GaussianNoise().estimate)(params, members, weights)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec(None, None, "x")):
        cut = jax.jit(GaussianNoise().estimate, out_shardings=NamedSharding(mesh, spec))(params, members, weights)
        assert equal(whole, cut)


@every_noise
@pytest.mark.parametrize("generator", rng.GENERATORS)
@pytest.mark.parametrize("first", [2, 1])
def test_rows_alone_are_the_rows_of_the_whole(noise, generator, first):
    noise, member = dataclasses.replace(noise, generator=generator), Population(2, seed=5).members(1)[1]
    for held in (noise, SharedSeedNoise(generator, stacked="layers/")):
        whole = jax.jit(lambda p, held=held: held.apply(p, member, sigma=0.1))(PARAMS)["layers"]["a"]
        row = {"layers": {"a": PARAMS["layers"]["a"][first:]}}
        alone = jax.jit(lambda i, held=held, row=row: held.apply(row, member, sigma=0.1, row=(i, 3)))(first)
        ulps = 0 if held.layers_alone else 4  # jax.random's numbers depend on the program they are made in
        np.testing.assert_allclose(alone["layers"]["a"], whole[first:], rtol=0, atol=ulps * 2.0**-23)
