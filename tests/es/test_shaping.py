import logging

import numpy as np
import pytest

from es_jax.es.shaping import SHAPINGS, centered_rank, z_score
from es_jax.training.grpo import group_relative


def test_z_score_uses_the_population_std():
    rewards = np.array([0.1, 0.4, -2.0, 3.0])
    assert np.allclose(z_score(rewards), (rewards - rewards.mean()) / (rewards.std(ddof=0) + 1e-8), atol=1e-6)
    assert z_score(rewards).dtype == np.float32


@pytest.mark.parametrize("value", [0.1, 0.0, -1e9, 1 / 3])
def test_equal_rewards_weigh_exactly_nothing_and_say_so(value, caplog):
    with caplog.at_level(logging.WARNING):
        weights = z_score(np.full(7, value))
    assert not weights.any()
    assert "all 7 rewards are equal" in caplog.text


@pytest.mark.parametrize("shape", SHAPINGS.values())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_names_its_member(shape, bad):
    rewards = np.array([0.0, 1.0, bad, 2.0])
    with pytest.raises(ValueError, match="rewards are not finite for member 2"):
        shape(rewards)
    expected = shape(np.array([0.0, 1.0, 0.0, 2.0]))
    assert np.array_equal(shape(rewards, nan_rewards="worst"), expected)
    with pytest.raises(ValueError, match="members 0"):
        shape(np.full(3, bad), nan_rewards="worst")


@pytest.mark.unchecked
def test_centered_rank_and_group_relative():
    assert centered_rank(np.array([3.0, -9.0, 100.0])).tolist() == [0.0, -0.5, 0.5]
    out = group_relative(np.array([1.0, 2.0, 3.0, 7.0, 7.0, 5.0]), np.array([0, 0, 0, 1, 1, 2]))
    assert np.allclose(out, [-1, 0, 1, 0, 0, 0], atol=1e-5)
    with pytest.raises(ValueError, match=r"groups have shape \(2,\) for 3 rewards"):
        group_relative(np.zeros(3), np.zeros(2, int))
