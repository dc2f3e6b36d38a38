"""AWD with AdamW on a Flax MLP that learns two tasks in turn: how much of the first task does it keep?

    python examples/forgetting.py [--small]

In each task, a random linear teacher divides points into two classes. Two of a point's inputs say which task it belongs
to. The second task is trained without rows of the first, as in fine-tuning. AWD goes last in the chain. It pulls the
weights toward those with which the second task began. Accuracies are on held-out rows.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from es_jax import anchored_weight_decay

RATES = {"l2": (0.0, 0.001, 0.003, 0.01, 0.03), "l1": (1e-4, 3e-4, 6e-4)}  # l2: a share of the distance; l1: an amount


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(128)(nn.relu(nn.Dense(128)(x)))))[:, 0]


def rows(task, split):
    """1,000 points and their labels. A point has 16 numbers; the last two say which task it belongs to."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(task), split), (1000, 14))
    teacher = jax.random.normal(jax.random.key(100 + task), (14,))
    return jnp.concatenate([x, jnp.tile(2 * jnp.eye(2)[task], (1000, 1))], axis=1), x @ teacher > 0


MODEL = MLP()
TRAIN, TEST = ([rows(task, split) for task in (0, 1)] for split in (0, 1))


def loss(params, task):
    x, label = TRAIN[task]
    return optax.sigmoid_binary_cross_entropy(MODEL.apply(params, x), label).mean()


def accuracy(params, task):
    x, label = TEST[task]
    return float(jnp.mean((MODEL.apply(params, x) > 0) == label))


def train(params, tx, task, steps):
    """The parameters after so many steps on a task."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, task), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0])(params)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    steps = 10 if options.small else 300
    start = train(MODEL.init(jax.random.key(0), TRAIN[0][0]), optax.adamw(1e-3), 0, steps)
    print("penalty  rate     first task  second task  distance")
    print(f"{'before':17} {accuracy(start, 0):10.3f} {accuracy(start, 1):12.3f} {0:9.3f}")
    for penalty, rates in {"l2": (0.01,)}.items() if options.small else RATES.items():
        for rate in rates:
            tx = optax.chain(optax.adamw(1e-3, weight_decay=0.0), anchored_weight_decay(rate, penalty=penalty))
            params = train(start, tx, 1, steps)
            distance = optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, params, start))
            print(f"{penalty:8} {rate:<8g} {accuracy(params, 0):10.3f} {accuracy(params, 1):12.3f} {distance:9.3f}")


if __name__ == "__main__":
    main()
