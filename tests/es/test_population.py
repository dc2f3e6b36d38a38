import jax
import numpy as np
import pytest

from es_jax.es.population import Population


def test_members_are_a_pure_function_of_seed_and_step():
    a, b = Population(6, seed=1), Population(6, seed=2)
    assert np.array_equal(a.members(3).seed, a.members(3).seed)
    assert np.array_equal(jax.jit(a.members)(3).seed, a.members(3).seed)
    everyone = np.concatenate([np.asarray(p.members(step).seed) for p in (a, b) for step in range(50)])
    assert len(set(everyone.tolist())) == len(everyone)


def test_pairs_share_a_seed_with_opposite_signs():
    members = Population(8, seed=0, antithetic=True).members(5)
    assert np.array_equal(members.seed[::2], members.seed[1::2])
    assert np.array_equal(members.sign[::2], -members.sign[1::2])
    assert len(set(np.asarray(members.seed).tolist())) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 1, "seed": 0}, "size is 1"),
        ({"size": 0, "seed": 0}, "size is 0"),
        ({"size": 7, "seed": 0, "antithetic": True}, "set it to 8"),
        ({"size": 4, "seed": -1}, "seed is -1"),
        ({"size": 4, "seed": 2**32}, "4294967295"),
        ({"size": 4, "seed": 0.5}, "seed is 0.5"),
    ],
)
@pytest.mark.unchecked
def test_bad_populations_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Population(**options)
