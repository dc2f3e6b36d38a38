"""What a step's rewards say: against linear and quadratic rewards whose gradient and curvature are known."""

import numpy as np
import pytest

from es_jax.es.shaping import z_score
from es_jax.rundir.seed_log import Entry
from es_jax.training.diagnostics import diagnose

ALPHA, SIGMA, N = 0.03, 0.2, 400


def step(reward, *, paired, dim=3, seed=0):
    """An entry of members on `reward(offset)`, and the step u that their weights make."""
    draw = np.random.default_rng(seed)
    signs = np.tile([1, -1], N // 2) if paired else np.ones(N, int)
    eps = draw.standard_normal((N // 2, dim)).repeat(2, axis=0) if paired else draw.standard_normal((N, dim))
    rewards = np.array([reward(SIGMA * s * e) for s, e in zip(signs, eps, strict=True)])
    weights = np.asarray(z_score(rewards))
    entry = Entry(1, list(range(N)), signs.tolist(), paired, rewards.tolist(), weights.tolist())
    return entry, ALPHA / N * (weights * signs) @ eps


@pytest.mark.parametrize("paired", [False, True])
def test_the_gain_is_what_the_step_adds_where_rewards_are_linear(paired):
    slope = np.array([1.0, -2.0, 0.5])
    entry, u = step(lambda x: 0.3 + slope @ x, paired=paired)
    got = diagnose(entry, learning_rate=ALPHA, sigma=SIGMA)
    assert got["expected_gain"] == pytest.approx(slope @ u, rel=1e-3)
    assert got["expected_gain"] == pytest.approx(ALPHA * np.linalg.norm(slope), rel=0.1)  # α‖g‖


def test_pairs_tell_slope_from_curvature():
    slope, curvature = np.array([1.0, 0.0, 0.0]), 3.0
    entry, u = step(lambda x: slope @ x + curvature / 2 * x @ x, paired=True)
    got = diagnose(entry, learning_rate=ALPHA, sigma=SIGMA)
    odd, even = SIGMA * 1.0, curvature / 2 * SIGMA**2 * np.sqrt(2 * 3)  # of g·ε, and of a chi square of 3 degrees
    assert got["linear_to_curvature"] == pytest.approx(odd / even, rel=0.15)
    assert got["expected_gain"] == pytest.approx(slope @ u, rel=1e-3)  # the even part cancels
    flat, _ = step(lambda x: slope @ x, paired=False)
    assert diagnose(flat, learning_rate=ALPHA, sigma=SIGMA)["linear_to_curvature"] is None


def test_members_of_equal_reward_are_counted():
    def share(rewards):
        entry = Entry(1, [0] * len(rewards), [1] * len(rewards), False, rewards, [0.0] * len(rewards))
        return diagnose(entry, learning_rate=1.0, sigma=1.0)["tied_members"]

    assert share([0.0, 0.0, 0.0]) == 1 and share([0.0, 0.5, 0.5, 1.0]) == 0.5 and share([0.1, 0.2]) == 0
    assert share([0.1, None]) is None
