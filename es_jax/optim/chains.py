"""From the config's fields to an optax chain: an optimizer, then the pull toward the anchor."""

import dataclasses
import math
from typing import Any

import jax
import optax

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
    def of(cls, config: Any) -> "Chain":
        """A run's; `config` as for `build_optimizer`."""
        optim, anchor = config.optim, config.optim.anchor
        options = {name: getattr(optim, name) for name in OPTIONS.get(optim.name, ())}
        return cls(
            optim.name,
            tuple((name, value) for name, value in options.items() if value is not None),
            optim.max_grad_norm,
            anchor.penalty,
            "param" if config.es.noise == "shared_seed" else "float32",  # as published: all in the weights' dtype
            anchor.ema_decay,
            anchor.memory,
        )

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
    config: Any, params: Any, *, rates: Any = None, anchor_sharding: Any = None
) -> tuple[optax.GradientTransformationExtraArgs, str]:
    """The optimizer of a run, and one sentence that describes it.

    Args:
      config: a `RunConfig`, or anything with its `optim` and `es` groups, `anchor_strength` (λ) and `anchor_kappa`
        (κ or None).
      params: the parameters it will be used on. Every leaf is stepped and anchored.
      rates: (α, αλ) of a step, which may be traced; the config's constants by default.
      anchor_sharding: where the anchor lives; see `anchored_weight_decay`.

    Returns:
      (transformation, sentence).

    >>> from es_jax.training.config import RunConfig
    >>> print(build_optimizer(RunConfig(), None)[1])
    sgd with learning rate 0.0005, no anchor.
    """
    del params  # no rule depends on the leaves yet
    if rates is None:
        rates = (config.optim.learning_rate, config.optim.learning_rate * config.anchor_strength)
    return Chain.of(config).transformation(rates, anchor_sharding), describe(config)


def describe(config: Any) -> str:
    """One sentence on the optimizer of a run; `config` as for `build_optimizer`."""
    chain, anchor = Chain.of(config), config.optim.anchor
    rate, strength = config.optim.learning_rate, config.anchor_strength
    sentence = "" if chain.max_grad_norm is None else f"gradients clipped at norm {chain.max_grad_norm:g}, "
    sentence += f"{chain.name} with learning rate {rate:g}{_by(config.optim.schedule)}"
    sentence += "".join(f", {name} {value:g}" for name, value in chain.options)
    if chain.penalty == "none":
        return f"{sentence}, no anchor."
    sentence += f", then {chain.penalty} anchored weight decay with strength λ = {strength:g}{_by(anchor.schedule)}"
    sentence += f" (αλ = {rate * strength:g}"
    if (kappa := config.anchor_kappa) is not None:
        if chain.penalty == "l2":  # λ follows from κ as if αλ were small; this is where the walk ends
            kappa *= (1 - rate * strength) / math.sqrt(1 - rate * strength / 2)
        sentence += f"; in the long run a weight drifts κ = {kappa:.2f} σ"
    target = "" if anchor.source is None else f" to {anchor.source}"
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
