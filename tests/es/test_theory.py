import math

import numpy as np
import pytest

from es_jax.es import theory

PAPER = dict(learning_rate=5e-4, dim=3_397_000_000, steps=500)


@pytest.mark.parametrize(
    ("population", "anchor", "norm"),
    [
        (30, {}, 119.0),
        (30, {"strength": 0.01, "penalty": "l1"}, 60.8),
        (30, {"strength": 10.0, "penalty": "l2"}, 52.8),
        (128, {}, 57.6),
        (256, {}, 40.7),
    ],
)
def test_the_paper_settings_in_exact_arithmetic(population, anchor, norm):
    formula = theory.anchored_norm if anchor else theory.random_walk_norm
    assert formula(**PAPER, population=population, **anchor) == pytest.approx(norm, abs=0.05)


@pytest.mark.parametrize(("penalty", "strength"), [("l2", 20.0), ("l1", 0.02), ("none", 0.0)])
def test_closed_forms_equal_a_simulation(penalty, strength):
    alpha, n, d, steps = 0.005, 8, 200_000, 60
    rng = np.random.default_rng(0)
    x = np.zeros(d)
    for _ in range(steps):
        x += alpha / math.sqrt(n) * rng.standard_normal(d)
        k = alpha * strength
        x = (1 - k) * x if penalty == "l2" else np.sign(x) * np.maximum(np.abs(x) - k, 0)
    norm = theory.anchored_norm(
        learning_rate=alpha, dim=d, steps=steps, population=n, strength=strength, penalty=penalty
    )
    # Soft thresholding is taken as continuous, which is off by about its share of a step.
    assert np.linalg.norm(x) == pytest.approx(norm, rel=0.03 if penalty == "l1" else 0.005)


@pytest.mark.parametrize("penalty", ["l2", "l1"])
def test_strength_for_kappa_is_where_the_walk_settles(penalty):
    alpha, sigma, n, kappa = 1e-4, 1e-3, 30, 0.7
    common = dict(learning_rate=alpha, population=n, penalty=penalty)
    strength = theory.strength_for_kappa(kappa, sigma=sigma, **common)
    settled = theory.anchored_norm(**common, dim=1, steps=10**6, strength=strength)
    assert settled == pytest.approx(kappa * sigma, rel=0.01)
    assert theory.kappa_for_strength(strength, sigma=sigma, **common) == pytest.approx(kappa)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="penalty is 'l3'"):
        theory.anchored_norm(**PAPER, population=8, strength=1.0, penalty="l3")
    with pytest.raises(ValueError, match="kappa is 0"):
        theory.strength_for_kappa(0, learning_rate=1e-3, sigma=1e-3, population=8)
    with pytest.raises(ValueError, match="with l2 it must be below 1"):
        theory.anchored_norm(**PAPER, population=8, strength=3000.0)
