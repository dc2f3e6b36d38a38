"""The experiment on continual learning, at a tiny size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from experiments import continual

TINY = continual.Size(
    steps=4, batch=8, train=64, test=32, width=8, seeds=(0, 1), chosen_on=(2,), rates=(0.0, 0.5),
    penalty_rates=(0.0, 0.5), learning_rates=(3.0, 0.1, float("nan"), 1.0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def promotion():
    """optax's own transformations need implicit promotion; Flax adds biases by it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_tiny_experiment_is_measured_kept_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(continual, "OPTIMIZERS", {"AdamW": continual.OPTIMIZERS["AdamW"]})
    monkeypatch.setattr(continual, "METHODS", {name: continual.METHODS[name] for name in ("AWD", "L2-SP")})
    monkeypatch.setattr(continual, "learning_rate", lambda name, size: 0.01)
    lines = continual.results("AdamW", TINY, tmp_path)
    distance = {key: [now["distance"] for now in lines if (now["method"], now["αλ"]) == key] for key in (
        ("before", 0.0), ("stopped early", 0.0), ("AWD", 0.0), ("AWD", 0.5), ("L2-SP", 0.0), ("L2-SP", 0.5),
    )}  # fmt: skip
    assert distance["before", 0.0] == [0, 0] and len(distance["stopped early", 0.0]) == 2 * 2
    assert distance["AWD", 0.0] == pytest.approx(distance["L2-SP", 0.0], abs=1e-3)
    for method in ("AWD", "L2-SP"):
        assert max(distance[method, 0.5]) < min(distance[method, 0.0])
    monkeypatch.setattr(continual, "train", None)  # what is kept is not run again
    monkeypatch.setattr(continual, "Size", lambda: TINY)
    monkeypatch.setattr("sys.argv", ["continual", f"--out={tmp_path}", f"--docs={tmp_path / 'docs'}"])
    continual.main()
    assert "| AWD 0.5 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        "continual.csv", "continual.md", "continual.png", "continual_methods.png",
    }  # fmt: skip
    assert len((tmp_path / "docs/continual.csv").read_text().splitlines()) == 1 + len(lines)
    assert json.loads((tmp_path / "AdamW, AWD.json").read_text())["size"]["steps"] == 4


def test_the_learning_rate_has_the_lowest_loss_and_not_nan(monkeypatch):
    """As if the first task ended with logits that favour one digit, and more so at a higher learning rate."""

    def ended(name, alpha, seed, rows, size):
        params = jax.tree.map(jnp.zeros_like, continual.MLP(size.width).init(jax.random.key(0), rows["first train"][0]))
        params["params"]["Dense_2"]["bias"] = params["params"]["Dense_2"]["bias"].at[0].set(alpha)
        return params

    monkeypatch.setattr(continual, "first_task", ended)
    assert continual.learning_rate("AdamW", TINY) == 0.1


def test_the_tasks_are_the_same_digits_and_the_second_has_its_pixels_permuted():
    rows, again = (continual.tasks(3, TINY) for _ in range(2))
    for task in rows:
        np.testing.assert_array_equal(rows[task][0], again[task][0])
    assert rows["first test"][0].shape == (32, continual.SIDE**2)
    spread = {task: np.asarray(rows[f"{task} train"][0]).std(axis=0) for task in ("first", "second")}
    assert np.abs(spread["first"] - spread["second"]).max() > 0.2  # other pixels are lit
    np.testing.assert_allclose(sorted(spread["first"]), sorted(spread["second"]), atol=0.15)


def test_the_chain_of_schedule_free_is_that_of_optax():
    ours, theirs = continual.schedule_free_adamw(0.1, optax.identity()), contrib.schedule_free_adamw(0.1)
    params = {"w": jnp.arange(3.0)}
    states = [ours.init(params), theirs.init(params)]
    for step in range(3):
        gradient = {"w": jnp.array([1.0, -1.0, step])}
        (u, states[0]), (v, states[1]) = (
            tx.update(gradient, state, params) for tx, state in zip((ours, theirs), states, strict=True)
        )
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-6)
        params = optax.apply_updates(params, u)


def test_the_experiment_says_what_it_asks_and_costs():
    assert all(f"{word}:" in continual.__doc__ for word in ("Question", "Command", "Cost", "Result"))
