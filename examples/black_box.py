"""ES on a black-box function, compared with two algorithms of evosax at the same number of evaluations.

    python examples/black_box.py [--small]

The function is Rastrigin's in 20 dimensions. It is a bowl with a local minimum near every point of whole numbers, and
is 0 at the origin. All algorithms start at the same points and evaluate equally many. evosax is optional: pip install
evosax.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from es_jax import GaussianNoise, Population, centered_rank

DIM, MEMBERS, SIGMA = 20, 128, 1.0


def rastrigin(x):
    return 10 * x.size + jnp.sum(x**2 - 10 * jnp.cos(2 * jnp.pi * x))


def start(seed):
    return jax.random.uniform(jax.random.key(seed), (DIM,), minval=-3.0, maxval=3.0)


def adam(steps):
    return optax.adam(optax.cosine_decay_schedule(0.1, steps))


def ours(seed, steps):
    """es_jax: mirrored pairs, ranks, Adam."""
    noise, population = GaussianNoise(), Population(MEMBERS, seed=seed, antithetic=True)
    params, tx = start(seed), adam(steps)
    state = tx.init(params)

    @jax.jit
    def rewards_of(params, members):
        return jax.vmap(lambda member: -rastrigin(noise.apply(params, member, sigma=SIGMA)))(members)

    @jax.jit
    def update(params, state, members, weights):
        updates, state = tx.update(noise.estimate(params, members, weights), state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        members = population.members(step)
        params, state = update(params, state, members, centered_rank(rewards_of(params, members)))
    return float(rastrigin(params))


def theirs(name, seed, steps):
    """An algorithm of evosax."""
    from evosax import algorithms

    options = {}
    if name == "Open_ES":
        options = {"optimizer": adam(steps), "std_schedule": optax.constant_schedule(SIGMA)}
    algorithm = getattr(algorithms, name)(population_size=MEMBERS, solution=start(seed), **options)
    params = algorithm.default_params
    if name == "CMA_ES":
        params = params.replace(std_init=SIGMA)

    def step(state, key):
        asked, told = jax.random.split(key)
        points, state = algorithm.ask(asked, state, params)
        return algorithm.tell(told, points, jax.vmap(rastrigin)(points), state, params)[0], None

    keys = jax.random.split(jax.random.key(seed), steps)
    state = algorithm.init(jax.random.key(seed), start(seed), params)
    state = jax.jit(lambda state: jax.lax.scan(step, state, keys)[0])(state)
    return float(rastrigin(algorithm.get_mean(state)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    steps, seeds = (3, range(1)) if options.small else (300, range(5))
    algorithms = {"es_jax": ours}
    try:
        import evosax  # noqa: F401
    except ImportError:
        print("evosax is not installed, so es_jax is alone here: pip install evosax")
    else:
        for name in ("Open_ES", "CMA_ES"):
            algorithms[f"evosax {name}"] = lambda seed, steps, name=name: theirs(name, seed, steps)
    print(f"Rastrigin, {DIM} dimensions, {steps * MEMBERS:,} evaluations, {len(seeds)} seeds: value at the mean\n")
    table = {"at the start": [float(rastrigin(start(seed))) for seed in seeds]}
    table |= {name: [algorithm(seed, steps) for seed in seeds] for name, algorithm in algorithms.items()}
    for name, found in table.items():
        print(f"{name:15} {np.mean(found):8.2f} ± {np.std(found) / max(len(found) - 1, 1) ** 0.5:.2f}")


if __name__ == "__main__":
    main()
