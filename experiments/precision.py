"""Question: does 16-bit arithmetic explain the published norms of anchored runs (arXiv 2605.30148)?

Pure-noise fitness on 200 thousand weights N(0, 0.025²), N = 30, 500 steps, everything in float16; ‖θ − θ₀‖ scaled to
d = 3.397e9.

Command:  python -m experiments.precision
Cost:     about two minutes on 2 CPU cores.
Result:   no anchor 119.1, l1 94.1, l2 68.7; published 119.2, 92.1, 67.7; exact arithmetic 119.0, 60.8, 52.8.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from es_jax import Population, SharedSeedNoise, anchored_weight_decay, z_score
from es_jax.core import rng

RATE, POPULATION, STEPS, SIZE, PUBLISHED_SIZE = 5e-4, 30, 500, 200_000, 3.397e9
SETTINGS = {"none": 0.0, "l1": 0.01, "l2": 10.0}


def norm(penalty: str, strength: float) -> float:
    """‖θ − θ₀‖ after the last step, scaled to the published number of weights."""
    start = (0.025 * jax.random.normal(rng.key(0), (SIZE,))).astype(jnp.float16)
    tx = optax.sgd(RATE)
    if strength:
        tx = optax.chain(tx, anchored_weight_decay(RATE * strength, penalty=penalty, arithmetic="param"))

    @jax.jit
    def step(params, state, members, weights):
        updates, state = tx.update(SharedSeedNoise().estimate(params, members, weights), state, params)
        return optax.apply_updates(params, updates), state

    params, population, draw = {"w": start}, Population(POPULATION, seed=0), np.random.default_rng(0)
    state = tx.init(params)
    for t in range(1, STEPS + 1):
        params, state = step(params, state, population.members(t), z_score(draw.standard_normal(POPULATION)))
    moved = params["w"].astype(jnp.float32) - start.astype(jnp.float32)
    return float(jnp.linalg.norm(moved)) * (PUBLISHED_SIZE / SIZE) ** 0.5


if __name__ == "__main__":
    for penalty, strength in SETTINGS.items():
        print(f"{penalty:5} {norm(penalty, strength):.1f}")
