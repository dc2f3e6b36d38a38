"""An optimizer from its name and numbers: an optax chain that ends with the pull toward the anchor."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from es_jax.core.names import unknown
from es_jax.optim.anchored import anchored_weight_decay, rounded

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
}
OPTIONS = {"adam": ("b1", "b2"), "adamw": ("b1", "b2", "weight_decay"), "lion": ("b1", "b2", "weight_decay")}


@dataclasses.dataclass(frozen=True)
class Chain:
    """All that the program of an optimizer depends on, except its rates: steps with equal chains share a program.

    `options` are the arguments of the optimizer `name` that are set. Penalty "none" is a chain without an anchor;
    `memory` is the memory kind of the anchor.
    """

    name: str = "sgd"
    options: tuple[tuple[str, float], ...] = ()
    max_grad_norm: float | None = None
    penalty: str = "none"
    arithmetic: str = "float32"
    ema_decay: float | None = None
    memory: str = "device"

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any], **fields: Any) -> "Chain":
        """The chain of an optimizer and of those of its `options` that it takes and that are not None."""
        given = ((option, options.get(option)) for option in OPTIONS.get(name, ()))
        return cls(name, tuple((option, value) for option, value in given if value is not None), **fields)

    def transformation(self, rates: Any, anchor_sharding: Any = None) -> optax.GradientTransformationExtraArgs:
        """The transformation with the rates (α, αλ) of a step, which may be traced; `anchor_sharding` is that of
        `anchored_weight_decay`."""
        step, pull = rates
        optimizer: Any = OPTIMIZERS[self.name](step, **dict(self.options))
        if self.max_grad_norm is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optimizer)
        optimizer = _separated(optimizer)
        if self.penalty == "none":
            return optimizer
        decay = anchored_weight_decay(
            pull,
            penalty=self.penalty,
            arithmetic=self.arithmetic,
            ema_decay=self.ema_decay,
            anchor_sharding=anchor_sharding,
        )
        return optax.chain(optimizer, decay)


def build_optimizer(
    name: str,
    learning_rate: float,
    *,
    b1: float | None = None,
    b2: float | None = None,
    weight_decay: float | None = None,
    max_grad_norm: float | None = None,
    penalty: str = "none",
    strength: float = 0.0,
    ema_decay: float | None = None,
    arithmetic: str = "float32",
    anchor_sharding: Any = None,
) -> tuple[optax.GradientTransformationExtraArgs, str]:
    """Builds the chain that a run steps with: an optimizer of optax, then anchored weight decay.

    The rate of the decay is αλ, learning rate times strength. Every leaf is stepped and anchored. Source: arXiv
    2605.30148, section 5, whose step is "sgd".

    Args:
      name: "sgd", "momentum" (0.9), "adam", "adamw" or "lion".
      learning_rate: α > 0. A run of ES folds the 1/σ of its gradient into it.
      b1: in [0, 1), decay of the first moment, for adam, adamw and lion. None is optax's default.
      b2: in [0, 1), decay of the second moment (of the momentum for lion), for adam, adamw and lion. None is optax's
        default.
      weight_decay: at least 0, decoupled and toward zero, for adamw and lion. None is optax's default.
      max_grad_norm: above 0: gradients of a larger norm are scaled down to it. None does not clip.
      penalty: of the anchor: "l2", "l1", or "none" for no anchor.
      strength: λ ≥ 0. With "l2", αλ must be below 1.
      ema_decay: in [0, 1): the anchor follows the weights. None keeps it where `init` put it.
      arithmetic: "float32", or "param" for the published rounding; see `anchored_weight_decay`.
      anchor_sharding: where the anchor lives; see `anchored_weight_decay`.

    Returns:
      The transformation, whose `update` needs the parameters if there is an anchor; and one sentence that describes
        it.

    Raises:
      ValueError: the optimizer, penalty or arithmetic is unknown, the optimizer does not take an option, there is a
        strength without a penalty, or a number is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> transformation, sentence = build_optimizer("sgd", 0.5, penalty="l2", strength=1.0)
      >>> print(sentence)
      sgd with learning rate 0.5, then l2 anchored weight decay with strength λ = 1 (αλ = 0.5).
      >>> params = {"w": jnp.array([1.0])}
      >>> updates, _ = transformation.update({"w": jnp.array([-4.0])}, transformation.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()  # one step up to 3, half of it pulled back
      [2.0]
    """
    if name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS))
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}: it must be finite and above 0")
    options = {"b1": b1, "b2": b2, "weight_decay": weight_decay}
    _check_options(name, options, max_grad_norm)
    if penalty == "none" and (strength or ema_decay is not None):
        raise ValueError("strength or ema_decay is set but penalty is 'none': set the penalty to 'l2' or 'l1'")
    chain = Chain.of(
        name, options, max_grad_norm=max_grad_norm, penalty=penalty, arithmetic=arithmetic, ema_decay=ema_decay
    )
    transformation = chain.transformation((learning_rate, learning_rate * strength), anchor_sharding)
    return transformation, describe(chain, learning_rate=learning_rate, strength=strength)


def _check_options(name: str, options: Mapping[str, float | None], max_grad_norm: float | None) -> None:
    for option, value in options.items():
        if value is None:
            continue
        if option not in OPTIONS.get(name, ()):
            takers = " or ".join(repr(other) for other, taken in OPTIONS.items() if option in taken)
            raise ValueError(f"{option} is {value}, but {name!r} has none: choose {takers}, or leave it out")
        if not 0 <= value < (math.inf if option == "weight_decay" else 1):
            below = "finite" if option == "weight_decay" else "below 1"
            raise ValueError(f"{option} is {value}: it must be at least 0 and {below}")
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm is {max_grad_norm}: it must be finite and above 0, or None")


def describe(
    chain: Chain,
    *,
    learning_rate: float,
    strength: float = 0.0,
    kappa: float | None = None,
    schedules: tuple[str, str] = ("constant", "constant"),
    source: str | None = None,
) -> str:
    """Describes an optimizer in one sentence.

    Args:
      chain: the optimizer.
      learning_rate: α.
      strength: λ.
      kappa: κ, the long-run drift of a weight in units of σ, where it is known.
      schedules: what α and λ are multiplied by, step by step, as texts.
      source: what the anchor was loaded from, where that is not the starting weights.

    Returns:
      The sentence.
    """
    sentence = "" if chain.max_grad_norm is None else f"gradients clipped at norm {chain.max_grad_norm:g}, "
    sentence += f"{chain.name} with learning rate {learning_rate:g}{_by(schedules[0])}"
    sentence += "".join(f", {name} {value:g}" for name, value in chain.options)
    if chain.penalty == "none":
        return f"{sentence}, no anchor."
    rate = learning_rate * strength
    sentence += f", then {chain.penalty} anchored weight decay with strength λ = {strength:g}{_by(schedules[1])}"
    sentence += f" (αλ = {rate:g}"
    if kappa is not None:
        if chain.penalty == "l2":  # λ follows from κ for small αλ; this is the κ that the walk reaches
            kappa *= (1 - rate) / math.sqrt(1 - rate / 2)
        sentence += f"; in the long run a weight drifts κ = {kappa:.2f} σ"
    target = "" if source is None else f" to {source}"
    if chain.ema_decay is not None:
        target += f" to an average of the weights over about {1 / (1 - chain.ema_decay):.0f} steps"
    return f"{sentence}){target}."


def _by(schedule: str) -> str:
    return "" if schedule == "constant" else f" times {schedule}"


def _separated(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer with rounded updates; without it the weights' last bits would depend on the sharding."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra):
        updates, state = optimizer.update(updates, state, params, **extra)
        return jax.tree.map(rounded, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
