"""`build_optimizer`: the chain is what its sentence says, and what does not fit together is refused."""

import jax.numpy as jnp
import optax
import pytest

from es_jax.optim.anchored import anchored_weight_decay
from es_jax.optim.chains import OPTIMIZERS, build_optimizer

PARAMS, GRADIENT = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 4.0])}


def stepped(transformation):
    updates, _ = transformation.update(GRADIENT, transformation.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)["w"].tolist()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_optaxs_optimizer_and_then_the_decay(name):
    built, sentence = build_optimizer(name, 0.1, penalty="l2", strength=2.0)
    by_hand = optax.chain(OPTIMIZERS[name](0.1), anchored_weight_decay(0.2))
    assert stepped(built) == pytest.approx(stepped(by_hand))
    assert sentence == f"{name} with learning rate 0.1, then l2 anchored weight decay with strength λ = 2 (αλ = 0.2)."


def test_every_option_arrives():
    options = {"b1": 0.5, "b2": 0.6, "weight_decay": 0.7}
    built, sentence = build_optimizer("adamw", 0.1, **options, max_grad_norm=1.0)
    by_hand = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, **options))
    assert stepped(built) == pytest.approx(stepped(by_hand))
    assert sentence == (
        "gradients clipped at norm 1, adamw with learning rate 0.1, b1 0.5, b2 0.6, weight_decay 0.7, no anchor."
    )


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("adan", {}, "did you mean 'adam'"),
        ("sgd", {"learning_rate": 0.0}, "learning_rate is 0.0"),
        ("sgd", {"b1": 0.9}, "b1 is 0.9, but 'sgd' has none"),
        ("adam", {"b2": 1.0}, "b2 is 1.0: it must be at least 0 and below 1"),
        ("adamw", {"weight_decay": -1.0}, "weight_decay is -1.0"),
        ("sgd", {"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ("sgd", {"strength": 1.0}, "penalty is 'none'"),
        ("sgd", {"penalty": "l3"}, "penalty is 'l3'"),
        ("sgd", {"penalty": "l2", "strength": 20.0}, "αλ < 1"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        build_optimizer(name, **({"learning_rate": 0.1} | options))
