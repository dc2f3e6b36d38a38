"""What ES does to the weights in exact arithmetic, in closed form: the lines that every run is checked against.

The members' weights are z-scores (mean 0, variance 1), so one update is α/N Σ zₙεₙ. That is a normal step of std α/√N
for each model weight, whatever the task. If the measured drift leaves these lines, precision was lost. The task is not
the reason.

The symbols are those of arXiv 2605.30148, whose algorithm they describe: α learning rate, λ penalty strength, σ noise
scale, N population, d number of weights, t steps, θ₀ the weights before step 1. κ is the long-run drift of a weight in
units of σ.

Examples:
  >>> from es_jax import theory
  >>> walk = theory.random_walk_norm(learning_rate=5e-4, dim=90_432, steps=100, population=30)
  >>> held = theory.anchored_norm(learning_rate=5e-4, dim=90_432, steps=100, population=30, strength=10.0)
  >>> round(walk, 3), round(held, 3)
  (0.275, 0.218)
"""

import math

import numpy as np

PENALTIES = ("none", "l2", "l1")


def random_walk_norm(
    *, learning_rate: float, dim: int, steps: int, population: int, pair_correlation: float = 0.0
) -> float:
    """Predicts ‖θ_t − θ₀‖ without an anchor: α √(d t / N).

    Args:
      learning_rate: α > 0.
      dim: d ≥ 1, how many weights get noise.
      steps: t ≥ 0.
      population: N ≥ 2.
      pair_correlation: c in [−1, 1], the correlation of the two rewards of an antithetic pair, which gives a factor √(1
        − c). It is 0 for independent members.

    Returns:
      The norm, in the unit of the weights.

    Examples:
      >>> round(random_walk_norm(learning_rate=5e-4, dim=3_397_000_000, steps=500, population=30), 1)
      119.0
    """
    return learning_rate * math.sqrt(dim * steps / population * (1 - pair_correlation))


def anchored_norm(
    *,
    learning_rate: float,
    dim: int,
    steps: int,
    population: int,
    strength: float,
    penalty: str = "l2",
    pair_correlation: float = 0.0,
) -> float:
    """Predicts ‖θ_t − θ₀‖ with anchored weight decay of strength λ.

    For l2, with q = 1 − αλ, it is α √(d/N) · √(q² (1 − q^{2t}) / (1 − q²)), which is exact. For l1 it is the second
    moment of a Brownian motion of variance α²/N a step with a drift αλ toward the anchor, from the reflection
    principle. That holds while αλ is small compared with the step α/√N, as it is wherever the penalty is used.

    Args:
      learning_rate: α > 0.
      dim: d ≥ 1, how many weights get noise.
      steps: t ≥ 0.
      population: N ≥ 2.
      strength: λ ≥ 0; with l2, αλ ≤ 1.
      penalty: "l2", "l1" or "none".
      pair_correlation: c in [−1, 1], as in `random_walk_norm`.

    Returns:
      The norm, in the unit of the weights.

    Raises:
      ValueError: the penalty is unknown, the strength is negative, or αλ is above 1 with l2.

    Examples:
      >>> common = dict(learning_rate=5e-4, dim=3_397_000_000, steps=500, population=30)
      >>> round(anchored_norm(**common, strength=10.0), 1)
      52.8
      >>> round(anchored_norm(**common, strength=0.01, penalty="l1"), 1)
      60.8
    """
    _check(penalty, strength)
    walk = random_walk_norm(
        learning_rate=learning_rate, dim=dim, steps=steps, population=population, pair_correlation=pair_correlation
    )
    if penalty == "none" or strength == 0 or steps == 0:
        return walk
    if penalty == "l1":
        return math.sqrt(dim * _drifting_second_moment(walk / math.sqrt(dim * steps), learning_rate * strength, steps))
    q = 1 - learning_rate * strength
    if not 0 <= q <= 1:
        raise ValueError(
            f"αλ is {learning_rate * strength}: with l2 it must be below 1; lower the strength λ or the learning rate α"
        )
    return walk * math.sqrt(q**2 * (1 - q ** (2 * steps)) / (1 - q**2) / steps)


def strength_for_kappa(
    kappa: float, *, learning_rate: float, sigma: float, population: int, penalty: str = "l2"
) -> float:
    """Finds the λ with which a weight drifts κσ in the long run: α / (2Nκ²σ²) for l2, α / (√2·Nκσ) for l1.

    Args:
      kappa: κ > 0, the wanted long-run standard deviation of a weight in units of σ. The published strengths are κ ≈
        0.91 (l2) and 1.18 (l1).
      learning_rate: α > 0.
      sigma: σ > 0.
      population: N ≥ 2.
      penalty: "l2" or "l1".

    Returns:
      λ.

    Raises:
      ValueError: κ is not above 0, or the penalty is unknown.

    Examples:
      >>> round(strength_for_kappa(0.91, learning_rate=5e-4, sigma=1e-3, population=30), 1)
      10.1
    """
    _check(penalty, 0.0)
    if not kappa > 0:
        raise ValueError(f"kappa is {kappa}: κ must be above 0; 1.0 lets a weight drift by one σ")
    if penalty == "l1":
        return learning_rate / (math.sqrt(2) * population * kappa * sigma)
    return learning_rate / (2 * population * kappa**2 * sigma**2)


def kappa_for_strength(
    strength: float, *, learning_rate: float, sigma: float, population: int, penalty: str = "l2"
) -> float:
    """Finds the κ that a strength λ leads to, the inverse of `strength_for_kappa`.

    Args:
      strength: λ > 0.
      learning_rate: α > 0.
      sigma: σ > 0.
      population: N ≥ 2.
      penalty: "l2" or "l1".

    Returns:
      κ, the long-run standard deviation of a weight in units of σ.

    Raises:
      ValueError: the penalty is unknown.

    Examples:
      >>> round(kappa_for_strength(0.01, learning_rate=5e-4, sigma=1e-3, population=30, penalty="l1"), 2)
      1.18
    """
    one = strength_for_kappa(1.0, learning_rate=learning_rate, sigma=sigma, population=population, penalty=penalty)
    return one / strength if penalty == "l1" else math.sqrt(one / strength)


def step_variance(weights: np.ndarray, *, paired: bool) -> float:
    """Says how far one step walks for each weight, in units of α²: Σ wₙ² / N².

    The weights of a pair count as one, w⁺ − w⁻. For z-scores the expectation is (1 − c)/N. The sum over a run's steps
    predicts the drift of that very run.

    Args:
      weights: [N], the shaped rewards of one step.
      paired: whether members 2i and 2i+1 are an antithetic pair.

    Returns:
      The variance of one weight's step, divided by α².

    Examples:
      >>> step_variance(np.array([1.0, -1.0]), paired=False), step_variance(np.array([1.0, -1.0]), paired=True)
      (0.5, 1.0)
    """
    weights = np.asarray(weights, np.float64)
    each = weights[::2] - weights[1::2] if paired else weights
    return float((each**2).sum() / len(weights) ** 2)


def _check(penalty: str, strength: float) -> None:
    if penalty not in PENALTIES:
        raise ValueError(f"penalty is {penalty!r}: it must be one of {', '.join(map(repr, PENALTIES))}")
    if not strength >= 0:
        raise ValueError(f"strength is {strength}: it must not be negative")


def _drifting_second_moment(step: float, pull: float, time: int) -> float:
    """E|X_t|² where |X| is a Brownian motion with std `step` per unit time, reflected at 0 and pulled toward 0 at speed
    `pull`.

    P(|X_t| > x) = Φ̄((x + mt)/(s√t)) + e^{−2mx/s²} Φ̄((x − mt)/(s√t)), and E|X|² = ∫ 2x P dx.
    """
    spread = step * math.sqrt(time)
    x = np.linspace(0, 9 * spread, 4001)
    tail = np.vectorize(lambda u: math.erfc(u / math.sqrt(2)) / 2)
    beyond = tail((x + pull * time) / spread)
    # The second term is a tiny factor times a probability: past its exponent's range it is zero.
    beyond = beyond + np.exp(-2 * pull * x / step**2) * tail((x - pull * time) / spread)
    return float(np.trapezoid(2 * x * beyond, x))
