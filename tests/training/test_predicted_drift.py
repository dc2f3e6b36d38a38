"""The predicted drift against a simulation of the update: schedules, an anchor elsewhere, an anchor that follows."""

import dataclasses

import numpy as np
import pytest

from es_jax.es.population import Population
from es_jax.es.shaping import z_score
from es_jax.rundir.seed_log import Entry
from es_jax.training.config import freeze
from es_jax.training.predicted_drift import PredictedDrift

DIM, STEPS, N = 100_000, 40, 8
CASES = {
    "free": {},
    "l2": {"anchor": {"penalty": "l2", "strength": 20.0}},
    "l2, schedules": {
        "anchor": {"penalty": "l2", "strength": 30.0, "schedule": "linear:0.2:5"},
        "schedule": "cosine:0.1:3",
    },
    "average": {"anchor": {"penalty": "l2", "strength": 60.0, "ema_decay": 0.9}},
    "l2 from elsewhere": {"anchor": {"penalty": "l2", "strength": 20.0, "source": "there"}},
    "average from elsewhere": {"anchor": {"penalty": "l2", "strength": 60.0, "ema_decay": 0.9, "source": "there"}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_where_the_weights_go(name):
    config = freeze({
        "es": {"population": N, "sigma": 0.01}, "optim": {"learning_rate": 0.005, **CASES[name]},
        "train": {"steps": STEPS},
    })  # fmt: skip
    draw, members = np.random.default_rng(0), Population(N, seed=0).members(1)
    x, u = np.zeros(DIM), 0.003 * draw.standard_normal(DIM)
    offset = float(np.linalg.norm(u)) if config.optim.anchor.source else 0.0
    a, prediction = (u if offset else np.zeros(DIM)), PredictedDrift(config, DIM, offset=offset)
    for step in range(1, STEPS + 1):
        weights, rates = np.asarray(z_score(draw.standard_normal(N))), config.rates(step)
        prediction.add(Entry.of(step, members, rewards=weights, weights=weights, rates=rates))
        x = x + rates.learning_rate / N * weights @ draw.standard_normal((N, DIM))
        q = 1 - rates.learning_rate * rates.strength
        x = a + q * (x - a)
        if config.optim.anchor.ema_decay is not None:
            a = config.optim.anchor.ema_decay * a + (1 - config.optim.anchor.ema_decay) * x
    assert prediction.norm == pytest.approx(np.linalg.norm(x), rel=0.01)


def test_nothing_is_predicted_where_there_is_no_closed_form():
    l1 = {"penalty": "l1", "strength": 0.02}
    for optim in (
        {"name": "adam"},
        {"anchor": l1 | {"ema_decay": 0.9}},
        {"anchor": l1 | {"source": "there"}},
        {"anchor": l1, "schedule": "linear"},
    ):
        assert PredictedDrift(freeze({"optim": optim}), 10).norm is None
    assert PredictedDrift(freeze({"optim": {"anchor": l1}}), 10).norm == 0
    members, weights = Population(8, seed=0).members(1), np.asarray(z_score(np.arange(8.0)))
    for strength, known in ((0.02, True), (0.15, False)):  # beside a step of 1/√8 = 0.35
        config = freeze({"es": {"population": 8}, "optim": {"anchor": l1 | {"strength": strength}}})
        prediction = PredictedDrift(config, 10)
        prediction.add(Entry.of(1, members, rewards=weights, weights=weights, rates=config.rates(1)))
        assert (prediction.norm is not None) == known


def test_an_old_log_has_the_constants_of_its_config():
    config = freeze({"optim": {"learning_rate": 0.1}})
    entry = Entry(1, [1, 2], [1, 1], False, [0.0, 1.0], [-1.0, 1.0])
    assert config.logged_rates(entry) == (0.1, 1e-3, 0.0)
    assert dataclasses.asdict(entry)["sigma"] is None
