"""From the config's fields to an optax chain: an optimizer, then the pull toward the anchor."""

import math
from typing import Any

import jax
import optax

from es_jax.core.threefry_normal import rounded
from es_jax.optim.anchored import anchored_weight_decay

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
}
OPTIONS = {"adam": ("b1", "b2"), "adamw": ("b1", "b2", "weight_decay"), "lion": ("b1", "b2", "weight_decay")}


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
    rate, penalty, strength = config.optim.learning_rate, config.optim.anchor.penalty, config.anchor_strength
    step, pull = (rate, rate * strength) if rates is None else rates
    given = {name: getattr(config.optim, name) for name in OPTIONS.get(config.optim.name, ())}
    given = {name: value for name, value in given.items() if value is not None}
    optimizer: Any = OPTIMIZERS[config.optim.name](step, **given)
    sentence = f"{config.optim.name} with learning rate {rate:g}{_by(config.optim.schedule)}"
    sentence += "".join(f", {name} {value:g}" for name, value in given.items())
    if config.optim.max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.optim.max_grad_norm), optimizer)
        sentence = f"gradients clipped at norm {config.optim.max_grad_norm:g}, {sentence}"
    optimizer = _separated(optimizer)
    if penalty == "none":
        return optimizer, f"{sentence}, no anchor."
    anchor = config.optim.anchor
    sentence += f", then {penalty} anchored weight decay with strength λ = {strength:g}{_by(anchor.schedule)}"
    sentence += f" (αλ = {rate * strength:g}"
    if (drift := config.anchor_kappa) is not None:
        if penalty == "l2":  # λ follows from κ as if αλ were small; this is where the walk ends
            drift *= (1 - rate * strength) / math.sqrt(1 - rate * strength / 2)
        sentence += f"; in the long run a weight drifts κ = {drift:.2f} σ"
    arithmetic = "param" if config.es.noise == "shared_seed" else "float32"  # as published: all in the weights' dtype
    decay = anchored_weight_decay(
        pull, penalty=penalty, arithmetic=arithmetic, ema_decay=anchor.ema_decay, anchor_sharding=anchor_sharding
    )
    kept = "" if anchor.source is None else f" to {anchor.source}"
    if anchor.ema_decay is not None:
        kept += f" to an average of the weights over about {1 / (1 - anchor.ema_decay):.0f} steps"
    return optax.chain(optimizer, decay), f"{sentence}){kept}."


def _by(schedule: str) -> str:
    return "" if schedule == "constant" else f" times {schedule}"


def _separated(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer, its float32 updates kept apart from the sum behind them: see `es_jax.core.threefry_normal.rounded`.

    Without it the weights' last bits depend on how a device's slice is cut.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params, **extra)
        return jax.tree.map(lambda u: rounded(u) if u.dtype == "float32" else u, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
