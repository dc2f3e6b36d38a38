"""Anchored Weight Decay (AWD) as an optax transformation: pull the weights a little toward where training began.

This file needs nothing but jax and optax, so it can be lifted into another project by itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AnchoredWeightDecayState(NamedTuple):
    """How many updates have been made, and the weights that they are pulled to."""

    count: jax.Array  # type: ignore[assignment]
    anchor: Any


def anchored_weight_decay(
    rate: float | jax.Array | optax.Schedule,
    *,
    penalty: str = "l2",
    mask: Any | Callable[[Any], Any] | None = None,
    anchor_dtype: Any = None,
    anchor_sharding: Any = None,
    arithmetic: str = "float32",
    ema_decay: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Decay toward the weights given to `init`, applied after the step (arXiv 2605.30148, section 5).

    With u the updates that arrive, θ' = θ + u and Δ = θ' − θ₀, the updates that leave bring the weights to

    .. math::
      \theta_0 + (1 - \text{rate})\,\Delta \quad(\text{l2}), \qquad
      \theta_0 + \text{sign}(\Delta)\,\max(|\Delta| - \text{rate}, 0) \quad(\text{l1}).

    In the paper's terms the rate is αλ: learning rate times penalty strength. Put it last in a chain, after any
    optimizer. l2 bounds how far the weights go; l1 also sets those that hardly moved back to the anchor.

    Args:
      rate: the fraction of the distance removed a step (l2, in [0, 1)), or the distance removed a step (l1, ≥ 0);
        a number, or a schedule of the number of updates made so far.
      penalty: "l2" or "l1".
      mask: a tree of booleans like the parameters (or a prefix of it), or a callable that makes one; leaves where it
        is False are left alone and have no anchor.
      anchor_dtype: dtype in which the anchor is kept; each parameter's own by default. A narrower one moves the anchor
        itself by its rounding.
      anchor_sharding: a sharding, or a tree of them like the parameters, on which the anchor is put; by default where
        the parameters are. With a memory kind of the host, such as "pinned_host", `update` (inside jit) brings it to
        the devices one leaf at a time.
      arithmetic: "float32" (float64 for float64 updates) computes one correction of the update and rounds once;
        "param" takes the step, subtracts the anchor, shrinks and adds it back in the parameters' own dtype, rounding
        each result, as the published code does. In 16 bits that loses most of the decay: it is there to explain
        published figures.
      ema_decay: β in [0, 1): the anchor follows the weights, anchor ← β·anchor + (1 − β)·θ after every update, an
        exponential average over about 1/(1 − β) updates. By default it stays where `init` put it.

    Returns:
      A transformation whose `update` needs `params`. The anchor is a copy, so the parameters may be donated.

    Raises:
      ValueError: an unknown penalty, a rate or ema_decay out of range, or `update` called without params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), anchored_weight_decay(0.5))
      >>> params = {"w": jnp.array([1.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([-1.0])}, state, params)
      >>> optax.apply_updates(params, updates)["w"].tolist()  # one step up to 2, half of it pulled back
      [1.5]
    """
    if penalty not in _PULL["float32"]:
        raise ValueError(f"penalty is {penalty!r}: it must be one of {', '.join(map(repr, _PULL['float32']))}")
    if arithmetic not in _PULL:
        raise ValueError(f"arithmetic is {arithmetic!r}: it must be 'float32' or 'param'")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(
            f"ema_decay is {ema_decay}: it is the anchor's weight in its own average and must be in [0, 1)"
        )
    _check_rate(rate, penalty)

    def init(params):
        anchor = jax.tree.map(lambda p: jnp.array(p, dtype=anchor_dtype, copy=True), params)
        if anchor_sharding is not None:
            anchor = jax.device_put(anchor, anchor_sharding)
        return AnchoredWeightDecayState(jnp.zeros([], jnp.int32), anchor)

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError(
                "anchored_weight_decay pulls the parameters themselves: call update(updates, state, params)"
            )
        now = rate(state.count) if callable(rate) else rate

        def pulled(u, p, a):
            wide = jnp.float32 if jnp.finfo(u.dtype).bits < 32 else u.dtype
            dtype = p.dtype if arithmetic == "param" else wide
            values = (jnp.asarray(x, dtype) for x in (u, p, a, now))
            return _PULL[arithmetic][penalty](*values).astype(u.dtype)

        def followed(a, p, u):
            new = (p + u.astype(p.dtype)).astype(jnp.promote_types(a.dtype, jnp.float32))
            old = a.astype(new.dtype)
            return (old + jnp.asarray(1 - ema_decay, new.dtype) * (new - old)).astype(a.dtype)

        anchor = state.anchor
        updates = jax.tree.map(pulled, updates, params, _on_devices(anchor, anchor_sharding))
        if ema_decay is not None:
            anchor = jax.tree.map(followed, anchor, params, updates)
        return updates, AnchoredWeightDecayState(optax.safe_increment(state.count), anchor)

    transformation = optax.GradientTransformationExtraArgs(init, update)
    return transformation if mask is None else optax.masked(transformation, mask)


def _on_devices(anchor, sharding):
    """The anchor, brought from the host where its sharding keeps it there."""
    if getattr(next(iter(jax.tree.leaves(sharding)), None), "memory_kind", None) in (None, "device"):
        return anchor
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, anchor)
    return jax.tree.map(lambda a, s: jax.device_put(a, s.with_memory_kind("device")), anchor, sharding)


def _l2(update, param, anchor, rate):
    # Written as a correction of the update, so that it rounds like the step itself; all the way at rate 1 is exact.
    return jnp.where(rate == 1, anchor - param, update - rounded(rate * (param + update - anchor)))


def rounded(product):
    """A float32 product less its last bit: no compiler then takes it unrounded into the sum after it."""
    if product.dtype != jnp.float32:
        return product
    bits = jax.lax.bitcast_convert_type(product, jnp.uint32) & jnp.uint32(0xFFFFFFFE)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _l1(update, param, anchor, rate):
    distance = param + update - anchor
    return jnp.where((jnp.abs(distance) <= rate) & (rate > 0), anchor - param, update - jnp.clip(distance, -rate, rate))


def _published(shrink):
    return lambda update, param, anchor, rate: anchor + shrink(param + update - anchor, rate) - param


_PULL = {
    "float32": {"l2": _l2, "l1": _l1},
    "param": {
        "l2": _published(lambda moved, rate: (1 - rate) * moved),
        "l1": _published(lambda moved, rate: jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - rate, 0)),
    },
}


def _check_rate(rate: Any, penalty: str) -> None:
    if callable(rate) or isinstance(rate, jax.core.Tracer):
        return
    if penalty == "l2" and not 0 <= float(rate) < 1:
        raise ValueError(
            f"rate is {rate} with penalty 'l2': it is the fraction of the distance to the anchor removed a step and "
            "must be in [0, 1); in terms of the paper αλ < 1, so lower the strength λ or the learning rate α"
        )
    if not float(rate) >= 0:
        raise ValueError(f"rate is {rate} with penalty {penalty!r}: it must not be negative or NaN")
