"""Where the anchored decay goes among optax's wrappers: each row of its docstring's table, against its fixed point."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

from es_jax.optim.anchored import anchored_weight_decay

ALPHA, PULL, TARGET = 0.1, 0.25, 3.0
FREE = 1 + ALPHA * (1 - PULL) / PULL  # from the anchor 1, with the gradient −1: Δ = (1 − pull)(Δ + α)
WEIGHTS = {"w": jnp.ones(2)}
PAIR = optax.LookaheadParams.init_synced(WEIGHTS)


def awd(**options):
    return anchored_weight_decay(PULL, **options)


def sgd():
    return optax.sgd(ALPHA)


def both():
    return optax.chain(sgd(), awd())


def masked(inner):
    """Every third step, the first included."""
    return optax.conditionally_mask(inner, lambda step: step % 3 == 0)


def adversary():
    return optax.chain(contrib.normalize(), optax.sgd(0.05))


def multi_steps(inner):
    return optax.MultiSteps(inner, 4).gradient_transformation()


def evaluated(state, params):
    return contrib.schedule_free_eval_params(state, params)


def end(tx, params=WEIGHTS, weights=lambda _, params: params, steps=400, gradient=lambda w: -jnp.ones_like(w), loss=()):
    """The first of the weights that are evaluated, in the end; `loss` names the extra arguments that are the loss."""

    def step(carry, _):
        params, state = carry
        fast = getattr(params, "fast", params)
        more = dict.fromkeys(loss, -jnp.sum(fast["w"]))
        updates, state = tx.update(jax.tree.map(gradient, fast), state, params, **more)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, tx.init(params)))
    return float(weights(state, params)["w"][0])


RIGHT = {
    "schedule_free": (contrib.schedule_free(both(), ALPHA), {"weights": evaluated}),
    "schedule_free in MultiSteps": (
        multi_steps(contrib.schedule_free(both(), ALPHA)),
        {"weights": lambda state, params: evaluated(state.inner_opt_state, params), "steps": 1600},
    ),
    "lookahead, slow": (optax.lookahead(both(), 3, 0.5), {"params": PAIR, "weights": lambda _, pair: pair.slow}),
    "lookahead, fast": (optax.lookahead(both(), 3, 0.5), {"params": PAIR, "weights": lambda _, pair: pair.fast}),
    "MultiSteps": (multi_steps(both()), {}),
    "sam": (contrib.sam(both(), adversary()), {}),
    "apply_if_finite inside": (optax.apply_if_finite(both(), 5), {}),
    "apply_if_finite after": (optax.chain(optax.apply_if_finite(sgd(), 5), awd()), {}),
    "conditionally_mask inside": (masked(both()), {"steps": 1200}),
    "masked inside": (optax.masked(both(), {"w": True}), {}),
    "masked after": (optax.chain(optax.masked(sgd(), {"w": True}), awd()), {}),
    "partition inside": (optax.partition({"a": both()}, {"w": "a"}), {}),
    "multi_transform after": (optax.chain(optax.multi_transform({"a": sgd()}, {"w": "a"}), awd()), {}),
    "selective_transform inside": (optax.selective_transform(both(), freeze_mask={"w": False}), {}),
    "flatten inside": (optax.flatten(both()), {}),
    "flatten after": (optax.chain(optax.flatten(sgd()), awd()), {}),
    "named_chain": (optax.named_chain(("step", sgd()), ("pull", awd())), {}),
    "split_real_and_imaginary": (contrib.split_real_and_imaginary(both()), {}),
    "clip": (optax.chain(optax.clip(2.0), sgd(), optax.clip_by_global_norm(1.0), awd()), {}),
    "reduce_on_plateau": (optax.chain(sgd(), contrib.reduce_on_plateau(patience=10_000), awd()), {"loss": ["value"]}),
    "lbfgs": (optax.chain(optax.lbfgs(ALPHA, linesearch=None), awd()), {}),
    "polyak_sgd": (optax.chain(optax.polyak_sgd(ALPHA, f_min=-1e9), awd()), {"loss": ["value"]}),
    "keep_params_nonnegative": (optax.chain(sgd(), awd(), optax.keep_params_nonnegative()), {}),
    "freeze": (optax.chain(sgd(), awd(), optax.freeze({"w": False})), {}),
    "inject_hyperparams": (optax.chain(sgd(), optax.inject_hyperparams(anchored_weight_decay)(rate=PULL)), {}),
    "inject_hyperparams around": (
        optax.inject_hyperparams(lambda rate: optax.chain(sgd(), anchored_weight_decay(rate)))(rate=PULL),
        {},
    ),
}


@pytest.mark.parametrize("place", RIGHT)
def test_the_place_of_the_table_has_the_fixed_point(place):
    tx, options = RIGHT[place]
    assert end(tx, **options) == pytest.approx(FREE, abs=1e-3)


def runs_away(weights):
    return not abs(weights) < 3.0


def stays_short(weights):
    return weights < FREE - 0.05


WRONG = {
    "schedule_free_sgd, after": (
        optax.chain(contrib.schedule_free_sgd(ALPHA), awd()),
        {"weights": lambda state, params: evaluated(state[0], params)},
        runs_away,
    ),
    "schedule_free_adamw, after": (
        optax.chain(contrib.schedule_free_adamw(ALPHA), awd()),
        {"weights": lambda state, params: evaluated(state[0], params)},
        runs_away,
    ),
    "lookahead, reset_state=True": (
        optax.lookahead(both(), 3, 0.5, reset_state=True),
        {"params": PAIR, "weights": lambda _, pair: pair.slow},
        runs_away,
    ),
    "MultiSteps, after": (optax.chain(multi_steps(sgd()), awd()), {}, stays_short),
    "apply_every": (optax.chain(optax.apply_every(4), sgd(), awd()), {}, lambda weights: abs(weights - FREE) > 0.1),
    "conditionally_mask, after": (optax.chain(masked(sgd()), awd()), {}, stays_short),
    "a sign after it": (optax.chain(awd(), optax.scale_by_learning_rate(ALPHA)), {}, runs_away),
    "cocob": (
        optax.chain(contrib.cocob(), awd()),
        {"params": {"w": jnp.array([1.0, 1.1])}, "gradient": lambda w: w - TARGET},
        lambda weights: abs(weights - TARGET) < 0.01,  # as if nothing pulled
    ),
}

if hasattr(contrib, "madgrad"):  # optax 0.2.8 has it, 0.2.6 has not
    WRONG["madgrad"] = optax.chain(contrib.madgrad(ALPHA), awd()), {}, runs_away


@pytest.mark.parametrize("place", WRONG)
def test_what_the_table_warns_of_is_so(place):
    tx, options, expected = WRONG[place]
    assert expected(end(tx, **options))


def test_every_name_of_optax_in_these_rows_is_in_the_docstring():
    words = set(inspect.getdoc(anchored_weight_decay).translate(str.maketrans("(),.", "    ")).split())
    names = {place.split(",")[0].split()[0] for place in (*RIGHT, *WRONG)} - {"a"}
    assert len(names) > 20 and names <= words


@pytest.mark.parametrize("fast", [sgd(), optax.adam(0.1), optax.lion(0.1)])
def test_after_lookahead_it_is_refused(fast):
    tx = optax.chain(optax.lookahead(fast, 3, 0.5), awd())
    with pytest.raises(ValueError, match=r"put the decay inside, lookahead\(chain\("):
        tx.init(PAIR)
    with pytest.raises(ValueError, match=r"put the decay inside, lookahead\(chain\("):
        awd().update(PAIR, awd().init(WEIGHTS), PAIR)


def test_inside_sam_the_adversary_is_not_pulled():
    """On ½(w − 3)² the gradient is that of a point 0.05 uphill, and Δ = (1 − pull)(Δ + α(3 − 1 + 0.05 − Δ))."""
    step = ALPHA * (1 - PULL)
    expected = 1 + step * (TARGET - 1 + 0.05) / (PULL + step)
    one, uphill = {"w": jnp.ones(1)}, lambda w: w - TARGET
    inside = contrib.sam(both(), adversary())
    after = optax.chain(contrib.sam(sgd(), adversary()), awd())
    assert end(inside, one, gradient=uphill) == pytest.approx(expected, abs=1e-4)
    assert end(after, one, gradient=uphill) != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_that_is_not_finite_is_pulled_after_apply_if_finite_and_not_inside(inside):
    tx = optax.apply_if_finite(both(), 5) if inside else optax.chain(optax.apply_if_finite(sgd(), 5), awd())
    state = tx.init(WEIGHTS)
    updates, _ = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, {"w": jnp.full(2, 2.0)})
    assert updates["w"].tolist() == ([0.0, 0.0] if inside else [-PULL, -PULL])


def test_conditionally_transform_pulls_at_its_steps_alone():
    tx = optax.chain(sgd(), optax.conditionally_transform(awd(), lambda step: (step + 1) % 2 == 0))
    params, state, seen = WEIGHTS, tx.init(WEIGHTS), []
    for _ in range(4):
        updates, state = tx.update({"w": -jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0]))
    assert seen == pytest.approx([1.1, 1.15, 1.25, 1.2625])


OTHERS = {
    optax: "adabelief adadelta adafactor adagrad adamax adamaxw adan amsgrad fromage lamb lars nadam nadamw novograd "
    "optimistic_adam_v2 optimistic_gradient_descent radam rmsprop sign_sgd signum sm3 yogi",
    contrib: "acprop ademamix adopt dog dowg galore muon simplified_ademamix",
}


LATER = ("signum", "galore")  # than the lowest optax that is allowed
KNOWN = [
    getattr(module, name)
    for module, names in OTHERS.items()
    for name in names.split()
    if name not in LATER or hasattr(module, name)
]


@pytest.mark.parametrize("make", KNOWN)
def test_after_every_optimizer_without_weights_of_its_own(make):
    """Where its last step u no longer moves the weights: Δ = u (1 − pull)/pull."""
    rate = {"learning_rate": ALPHA} if "learning_rate" in inspect.signature(make).parameters else {}
    last = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))
    tx, params = optax.chain(make(**rate), last, awd()), {"w": jnp.ones((2, 2))}
    seen = end(
        tx, params, lambda state, params: {"w": (params["w"] - state[1]["w"] * (1 - PULL) / PULL)[0]}, steps=1000
    )
    assert seen == pytest.approx(1.0, abs=0.03)
