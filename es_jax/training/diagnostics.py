"""Diagnostics of a step from its rewards alone, at no extra cost. docs/diagnostics.md derives each of them."""

import numpy as np

from es_jax.rundir.seed_log import Entry


def diagnose(entry: Entry, *, learning_rate: float, sigma: float) -> dict[str, float | None]:
    """Diagnostics of one ES step, from its rewards, weights, α and σ.

    Returns:
      expected_gain: how much reward the step adds to first order, α/(Nσ) Σ wₙ ρₙ, with ρₙ = rₙ − r̄, or for a pair its
        odd part ±(r⁺ − r⁻)/2.
      tied_members: the share of members, 0..1, that have the same reward as another member.
      linear_to_curvature: for antithetic pairs, the rms of (r⁺ − r⁻)/2 over the standard deviation of (r⁺ + r⁻)/2. A
        value is None if a reward is not finite or a denominator is 0.

    >>> entry = Entry(1, [1, 1], [1, -1], True, [0.5, 0.25], [1.0, -1.0])
    >>> diagnose(entry, learning_rate=0.1, sigma=0.5)["expected_gain"]
    0.025
    """
    rewards = np.array(entry.rewards, float)
    numbers: dict[str, float | None] = {"expected_gain": None, "tied_members": None, "linear_to_curvature": None}
    if not np.isfinite(rewards).all():
        return numbers
    _, counts = np.unique(rewards, return_counts=True)
    numbers["tied_members"] = float(counts[counts > 1].sum() / len(rewards))
    linear = rewards - rewards.mean()
    if entry.paired:
        odd, even = (rewards[::2] - rewards[1::2]) / 2, (rewards[::2] + rewards[1::2]) / 2
        linear = np.repeat(odd, 2) * np.array(entry.signs, float)
        if even.std() > 0:
            numbers["linear_to_curvature"] = float(np.sqrt(np.mean(odd**2)) / even.std())
    numbers["expected_gain"] = float(learning_rate / sigma * np.mean(np.array(entry.weights, float) * linear))
    return numbers
